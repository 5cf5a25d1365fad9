"""`galerne export`: checkpoint to bundle."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from galerne.cli.output import Adapter, CheckpointPath, Json, emit, size
from galerne.runtime.manifest import Dialect

# Must read as the keys of galerne.optimize.quantize.recipe.PRECISIONS, which a test holds them to.
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(export)


def export(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Option(help="The bundle's folder; it must not exist yet.", show_default=False)],
    precision: Annotated[Precision | None, typer.Option(help="How weights are stored.", show_default="fp16")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe's name or .toml file, in place of --precision.")] = None,
    chunk: Annotated[int | None, typer.Option(help="The most new tokens of one run.", show_default="256")] = None,
    max_context: Annotated[
        int | None, typer.Option(help="The longest sequence; sizes the ring where there is no window.")
    ] = None,
    dialect: Annotated[
        Dialect, typer.Option(help="The graph's operators: ONNX's newest, or basic ones only, for an older stack.")
    ] = "opset24",
    adapter: Adapter = None,
    adapter_slots: Annotated[
        bool, typer.Option("--adapter-slots", help="Let LoRA adapters be chosen at run time: `generate --adapter`.")
    ] = False,
    json: Json = False,
) -> None:
    """Export a checkpoint to a bundle: trace on the meta device, then stream the weights."""
    from galerne.export.checkpoint.open import open_checkpoint
    from galerne.export.export import DEFAULT_CHUNK
    from galerne.export.export import export as run
    from galerne.export.prequantized import choose_recipe

    source = open_checkpoint(checkpoint, adapter)
    bundle = run(
        source,
        choose_recipe(source, precision, recipe),
        out,
        chunk=DEFAULT_CHUNK if chunk is None else chunk,
        max_context=max_context,
        dialect=dialect,
        adapter_slots=adapter_slots,
    )
    total = sum(entry.size for entry in bundle.manifest.files.values())
    graph = bundle.manifest.graph
    data = {"bundle": str(out), "size_bytes": total, "capacities": graph.capacities, "chunk": graph.chunk}
    emit(
        json,
        data,
        f"{out}: {size(total)}, ring of {' and '.join(map(str, graph.capacities))} slots, chunks of {graph.chunk} tokens",
    )
