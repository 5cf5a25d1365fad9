"""`galerne deploy`: a package onto a box."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from galerne.cli.output import Json, emit


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(deploy)


def deploy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `galerne package` wrote.", show_default=False)],
    host: Annotated[str, typer.Argument(metavar="HOST", help="As for ssh: box or user@box.", show_default=False)],
    port: Annotated[int, typer.Option(help="Of the box's ssh server.", min=1, max=65535)] = 22,
    engine: Annotated[
        str, typer.Option(help='"tensorrt", or "portable" for the graph itself on the CPU.')
    ] = "tensorrt",
    keep: Annotated[int, typer.Option(help="Versions to keep on the box.", min=1)] = 2,
    check: Annotated[bool, typer.Option("--check", help="Bring it, and only check whether the box is ready.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on although the box is not as expected.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be run.")] = False,
    json: Json = False,
) -> None:
    """Copy a package to a box, going on where a transfer broke off, and install it there."""
    from galerne.export.package.deploy import Deployment

    options = ["--engine", engine, "--keep", str(keep)]
    options += ["--check"] * check + ["--force"] * force
    deployment = Deployment(file, host, port, tuple(options))
    commands = deployment.commands()
    if not dry_run:
        deployment.run()
    text = f"{host}: {'ready' if check else 'installed'}"
    if dry_run:
        text = "\n".join(map(shlex.join, commands))
    emit(json, {"host": host, "commands": commands, "ran": not dry_run}, text)
