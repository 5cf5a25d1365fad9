"""`galerne package`: one file for a Jetson."""

from pathlib import Path
from typing import Annotated

import typer

from galerne.cli.output import BundlePath, Json, SourcePath, emit, size


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(package)


def package(
    bundle: BundlePath,
    source: SourcePath,
    target: Annotated[str, typer.Option(help="A Jetson's name; see `galerne targets`.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Ends in .tar.zst or .tar.", show_default=False)],
    stack: Annotated[str | None, typer.Option(help="One of its software stacks; by default its first.")] = None,
    name: Annotated[
        str | None, typer.Option(help="What the bundle is called on the box; its folder's name by default.")
    ] = None,
    wheels: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the box's wheels there; with all of them no network is needed."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Pack a bundle without a passing parity verdict.")] = False,
    json: Json = False,
) -> None:
    """Pack a bundle, its build plan, the runtime with its wheels and an installer for a Jetson into one file."""
    from galerne.export.checkpoint.open import open_checkpoint
    from galerne.export.package.package import package as run
    from galerne.runtime.bundle import Bundle
    from galerne.targets.target import load

    chosen = load(target)
    made = run(
        Bundle.open(bundle),
        open_checkpoint(source),
        chosen,
        chosen.stack(stack),
        out,
        name=name,
        wheels=wheels,
        force=force,
    )
    data = {"file": str(made.path), "name": made.name, "size_bytes": made.size_bytes, "wheels": list(made.wheels)}
    emit(
        json,
        data,
        f"{made.path}: {size(made.size_bytes)}; on the box: unpack it and run install.sh, or `galerne deploy`",
    )
