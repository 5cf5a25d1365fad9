"""`galerne quantize`: a checkpoint's weights rounded by what text does in the model."""

from pathlib import Path
from typing import Annotated

import typer

from galerne.cli.output import CheckpointPath, Json, emit, size


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(quantize)


def quantize(
    checkpoint: CheckpointPath,
    recipe: Annotated[
        str,
        typer.Option(help="A recipe that needs text, by name or .toml file, such as int4-gptq.", show_default=False),
    ],
    calibration: Annotated[Path, typer.Option(metavar="TEXT", help="Text to calibrate on, UTF-8.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="The quantized checkpoint's folder; it must not exist yet.", show_default=False)
    ],
    tokens: Annotated[int | None, typer.Option(help="How many to feed.", min=2, show_default="the recipe's")] = None,
    length: Annotated[int | None, typer.Option(help="Of a sequence.", min=2, show_default="the recipe's")] = None,
    json: Json = False,
) -> None:
    """Round a checkpoint's weights on calibration text, layer by layer, into a compressed-tensors checkpoint.

    A run that was stopped goes on where it was when the same command is given again. `export` makes a bundle of the result.
    """
    from galerne.export.calibrate.quantize import quantize as run
    from galerne.export.checkpoint.open import open_checkpoint
    from galerne.optimize.quantize.recipe import load

    name = Path(recipe).name
    run(open_checkpoint(checkpoint), load(recipe), name, calibration, out, tokens=tokens, length=length)
    total = sum(file.stat().st_size for file in out.iterdir())
    data = {"checkpoint": str(out), "size_bytes": total, "recipe": name}
    emit(json, data, f"{out}: {size(total)}, by {name}; galerne export {out} --out BUNDLE makes a bundle of it")
