"""`galerne synth`: a checkpoint of a known shape with random weights."""

from pathlib import Path
from typing import Annotated

import typer

from galerne.cli.output import Json, emit, size


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(synth)


def synth(
    preset: Annotated[
        str, typer.Argument(metavar="PRESET", help="A known shape, such as mistral-7b-v0.1.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint's folder; it must not exist yet.", show_default=False)],
    layers: Annotated[int | None, typer.Option(help="Only the first N layers.", show_default="all")] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.", min=0)] = 0,
    json: Json = False,
) -> None:
    """Write a checkpoint of a known shape with random weights, to learn what the real one takes."""
    from galerne.export.synth import synth as run

    weights = run(preset, out, layers=layers, seed=seed)
    total = sum(file.stat().st_size for file in out.iterdir())
    data = {"checkpoint": str(out), "weights": weights, "size_bytes": total}
    emit(json, data, f"{out}: {preset}, {weights / 1e9:.2f} B random weights, {size(total)}")
