"""`galerne targets`: the hardware that engines can be built for."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from galerne.cli.output import Json, emit, table

if TYPE_CHECKING:
    from galerne.targets.target import Stack, Target

_WIDTH = 116


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(targets)


def targets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show all of this target, with sources.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Show the hardware table, or all that is known of one target."""
    from galerne.targets.target import load, load_all

    chosen = [load(name)] if name is not None else load_all()
    text = _table(chosen) if name is None else _page(chosen[0])
    emit(json, [dataclasses.asdict(target) for target in chosen], text)


def _table(targets: list["Target"]) -> str:
    rows = [["name", "SM", "memory", "usable", "bandwidth", "types", "default stack"]]
    for target in targets:
        rows.append(
            [
                target.name,
                target.compute_capability or "-",
                _gib(target.memory_bytes),
                _gib(target.usable_bytes),
                _rate(target.bandwidth_bytes_per_s),
                _types(target.stacks[0]),
                target.stacks[0].name + (f" +{len(target.stacks) - 1}" if len(target.stacks) > 1 else ""),
            ]
        )
    return table(rows)


def _page(target: "Target") -> str:
    bandwidth = _rate(target.bandwidth_bytes_per_s)
    facts = [
        ("title", target.title),
        ("kind", f"{target.kind}{', CPU and GPU share the memory' if target.unified_memory else ''}"),
        ("capability", target.compute_capability or "-"),
        ("memory", f"{_gib(target.memory_bytes)}, of which {_gib(target.usable_bytes)} are left for engines"),
        ("bandwidth", bandwidth if target.bandwidth_bytes_per_s else "measured on the spot"),
    ]
    if target.memory_bytes is None:
        facts[3] = ("memory", "this machine's own")
    rates = [f"{kind} {rate / 1e12:g}" for kind, rate in target.dense_ops_per_s.items()]
    facts.append(("peak", f"{', '.join(rates)} Tops/s, without sparsity" if rates else "-"))
    lines = [f"{key:<11}{value}" for key, value in facts]
    if target.power_modes:
        rows = [["power mode", "nvpmodel -m", "watts", "bandwidth"]]
        rows += [
            [
                mode.name,
                str(mode.number),
                "-" if mode.watts is None else str(mode.watts),
                _rate(mode.bandwidth_bytes_per_s or target.bandwidth_bytes_per_s),
            ]
            for mode in target.power_modes
        ]
        lines += ["", table(rows)]
    rows = [["stack", "backend", "CUDA", "Python", "dialect", "built on", "types"]]
    rows += [
        [
            stack.name,
            f"{stack.backend} {stack.version or ''}".strip(),
            stack.cuda or "-",
            stack.python or "-",
            stack.dialect,
            {"any": "any machine", "gpu": "such a GPU", "device": "the device"}[stack.builds_on],
            _types(stack),
        ]
        for stack in target.stacks
    ]
    lines += ["", table(rows), "", "sources"]
    sources = [(key, [text]) for key, text in target.sources.items()]
    sources += [(stack.name, list(stack.source)) for stack in target.stacks]
    for key, texts in sources:
        lines += [key, *(line for text in texts for line in _wrapped(text))]
    return "\n".join(lines)


def _types(stack: "Stack") -> str:
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    return " ".join(short.get(kind, kind) for kind in stack.types)


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.1f} GiB"


def _rate(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.0f} GB/s"


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(
        text, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
