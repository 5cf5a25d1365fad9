"""`galerne compile`: the engine of a plan that another machine made."""

from pathlib import Path
from typing import Annotated

import typer

from galerne.cli.output import BundlePath, Json, emit
from galerne.progress import step


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command("compile")(compile_)


def compile_(
    bundle: BundlePath,
    plan: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Holds build.json and network.onnx.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """Build the engine of a package's plan on the box itself; what install.sh calls."""
    from galerne.optimize.builders.from_plan import build_from_plan
    from galerne.optimize.builders.tensorrt.build_plan import PLAN, load_plan
    from galerne.runtime.bundle import ENGINES, Bundle

    target = load_plan(plan / PLAN).target
    with step(f"build for {target}"):
        build_from_plan(Bundle.open(bundle), plan)
    emit(json, {"engine": target}, f"{bundle}/{ENGINES}/{target}")
