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
    force: Annotated[
        bool, typer.Option("--force", help="Replace an engine; build although the parity check failed.")
    ] = False,
    json: Json = False,
) -> None:
    """Build the engine for a target into the bundle, without a GPU where TensorRT-RTX allows it."""
    from galerne.optimize.builders.build import build as run
    from galerne.runtime.bundle import ENGINES, Bundle
    from galerne.runtime.engines.record import load_record
    from galerne.targets.target import load

    chosen = load(target)
    opened = Bundle.open(bundle)
    if "portable" not in opened.manifest.parity:
        say("warning: the bundle has no parity verdict; `galerne verify` gives it one")
    with step(f"build for {chosen.title}"):
        built = run(opened, chosen, force=force)
    record = load_record(built, chosen.name)
    prefix = f"{ENGINES}/{chosen.name}/"
    total = sum(entry.size for name, entry in built.manifest.files.items() if name.startswith(prefix))
    data = {
        "engine": chosen.name,
        "backend": record.backend,
        "backend_version": record.backend_version,
        "size_bytes": total,
        "parity": record.parity,
    }
    emit(json, data, f"{bundle / prefix}: {size(total)}, {record.backend} {record.backend_version}")
