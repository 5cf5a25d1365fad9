"""`galerne targets`: the hardware that engines can be built for."""

import dataclasses
from typing import Annotated

import typer

from galerne.cli.output import Json, emit, size, table


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(targets)


def targets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show only this target.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Show the hardware table."""
    from galerne.targets.target import load, load_all

    chosen = [load(name)] if name is not None else load_all()
    rows = [["name", "title", "stacks", "capability", "memory", "bandwidth"]]
    for target in chosen:
        memory = "-" if target.memory_bytes is None else size(target.memory_bytes)
        bandwidth = "-" if target.bandwidth_bytes_per_s is None else f"{target.bandwidth_bytes_per_s / 1e9:.0f} GB/s"
        rows.append(
            [
                target.name,
                target.title,
                ", ".join(stack.name for stack in target.stacks),
                target.compute_capability or "-",
                memory,
                bandwidth,
            ]
        )
    emit(json, [dataclasses.asdict(target) for target in chosen], table(rows))
