"""`galerne check`: will a target take every operator and type of a bundle."""

import dataclasses
from typing import Annotated

import typer

from galerne.cli.output import BundlePath, Json, Stack, emit, table
from galerne.errors import CheckFailed


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(check)


def check(
    bundle: BundlePath,
    target: Annotated[str, typer.Option(help="A target's name; see `galerne targets`.", show_default=False)],
    stack: Stack = None,
    json: Json = False,
) -> None:
    """Hold a bundle's graph against what the software on a target reads, and say what to do about the rest."""
    from galerne.optimize.check import check as run
    from galerne.runtime.bundle import GRAPH, Bundle
    from galerne.targets.target import load

    device = load(target)
    chosen = device.stack(stack)
    refusals = run(Bundle.open(bundle).file(GRAPH), device, chosen)
    # Layers repeat each other, so a person sees each kind once.
    kinds: dict[tuple[str | None, str, str, str], list[str | None]] = {}
    for refusal in refusals:
        key = (refusal.operator, refusal.found, refusal.expected, refusal.alternative)
        kinds.setdefault(key, []).append(refusal.node)
    rows = [["operator", "nodes", "first", "found", "expected"]]
    rows += [
        [operator or "-", str(len(nodes)), nodes[0] or "-", *what[:2]] for (operator, *what), nodes in kinds.items()
    ]
    ways = list(dict.fromkeys(key[-1] for key in kinds))
    fine = f"{device.title} with {chosen.name} takes all of it"
    data = {
        "passed": not refusals,
        "target": device.name,
        "stack": chosen.name,
        "refusals": [dataclasses.asdict(refusal) for refusal in refusals],
    }
    emit(json, data, "\n".join([table(rows), "", *ways]) if refusals else fine)
    if refusals:
        what = ", ".join(sorted({refusal.operator or "its opset" for refusal in refusals}))
        raise CheckFailed(f"{bundle}: {device.name} with {chosen.name} does not take it ({what}); {'; '.join(ways)}")
