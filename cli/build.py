"""`galerne build`: a bundle's engine for a target."""

from typing import Annotated

import typer

from galerne.cli.output import BundlePath, Json, emit, size
from galerne.progress import say, step


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(build)


def build(
    bundle: BundlePath,
    target: Annotated[str, typer.Option(help="A target's name; see `galerne targets`.", show_default=False)],
    stack: Annotated[
        str | None,
        typer.Option(help="One of the target's software stacks; by default the first whose builder is installed here."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences in one run, MIN:OPT:MAX or one number for all three.")] = "1",
    draft: Annotated[
        int,
        typer.Option(help="A profile to check this many guessed tokens in one run, with logits for each; 0 for none."),
    ] = 0,
    strip: Annotated[
        bool, typer.Option("--strip", help="Leave the weights out; they are read from weights.bin at loading.")
    ] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Let the runtime keep a part of the weights in host memory.")
    ] = False,
    hardware_compatibility: Annotated[
        str, typer.Option(help="Other GPUs it is to run on: none, ampere_plus or same_compute_capability.")
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later versions of TensorRT load it.")
    ] = False,
    locked: Annotated[
        bool, typer.Option("--locked", help="Fail where the timing cache lacks something: the rebuild is the same.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an engine; build although the parity check failed.")
    ] = False,
    json: Json = False,
) -> None:
    """Build the engine for a target into the bundle, without a GPU where TensorRT-RTX allows it."""
    from galerne.optimize.builders.build import build as run
    from galerne.optimize.builders.build import choose_stack
    from galerne.optimize.builders.tensorrt.options import read_options
    from galerne.runtime.bundle import ENGINES, Bundle
    from galerne.runtime.engines.record import load_record
    from galerne.targets.target import load

    chosen = load(target)
    options = read_options(
        batch=batch,
        draft=draft,
        strip=strip,
        weight_streaming=weight_streaming,
        hardware_compatibility=hardware_compatibility,
        version_compatible=version_compatible,
    )
    opened = Bundle.open(bundle)
    if "portable" not in opened.manifest.parity:
        say("warning: the bundle has no parity verdict; `galerne verify` gives it one")
    taken, why = choose_stack(chosen, stack)
    say(f"stack {taken.name}: {why}")
    with step(f"build for {chosen.title}"):
        built = run(opened, chosen, stack=taken, options=options, locked=locked, force=force)
    record = load_record(built, chosen.name)
    prefix = f"{ENGINES}/{chosen.name}/"
    total = sum(entry.size for name, entry in built.manifest.files.items() if name.startswith(prefix))
    data = {
        "engine": chosen.name,
        "stack": record.stack,
        "backend": record.backend,
        "backend_version": record.backend_version,
        "size_bytes": total,
        "parity": record.parity,
    }
    emit(json, data, f"{bundle / prefix}: {size(total)}, {record.backend} {record.backend_version}")
