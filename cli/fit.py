"""`galerne fit`: whether a model fits a device, and how fast it can run there at most."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from galerne.cli.export import Precision
from galerne.cli.output import Json, emit, parse_bytes, size, table
from galerne.errors import CheckFailed, InputError
from galerne.progress import say

if TYPE_CHECKING:
    from galerne.optimize.fit.choice import Assessment, Case
    from galerne.optimize.quantize.recipe import AnyRecipe


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(fit)


def fit(
    source: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE_OR_CONFIG",
            help="A bundle, a config.json, a checkpoint, or a preset's name such as mistral-7b-v0.1.",
            show_default=False,
        ),
    ],
    target: Annotated[str, typer.Option(help="A target's name; see `galerne targets`.", show_default=False)],
    stack: Annotated[str | None, typer.Option(help="One of the target's stacks; by default its first.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="How weights are stored.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe's name or .toml file, in place of --precision.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of each row.", show_default="4096, or the longest if that is less")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 1,
    memory_budget: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="What it may take, such as 6GB or 6GiB; by default all that is left."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory and speed over the context: a .html or .svg file.")
    ] = None,
    json: Json = False,
) -> None:
    """Say whether a model fits a target, with what context and batch, and how fast it can run there at most."""
    from galerne.optimize.fit.choice import assess
    from galerne.optimize.fit.plot import draw, kind_of
    from galerne.optimize.quantize.recipe import PRECISIONS, load

    if plot is not None:
        kind_of(plot)  # before the work
    if precision is not None and recipe is not None:
        raise InputError("--precision and --recipe: give one of them")
    budget = None if memory_budget is None else parse_bytes("--memory-budget", memory_budget)
    case, own, own_name = _case(source, target, stack, context, batch, budget)
    name = recipe if recipe is not None else PRECISIONS[precision] if precision is not None else None
    result = assess(case, own, own_name) if name is None else assess(case, load(name), name)
    if plot is not None:
        draw(result, plot)
    emit(json, result.tree(), _text(result))
    if not result.chosen.fits:
        raise CheckFailed(result.refusal())
    if not result.chosen.builds:
        building, usable = result.chosen.transient_bytes["building"], result.chosen.usable_bytes
        say(
            f"warning: building the engine there takes up to {size(building)} of the usable {size(usable)}: give the box "
            f"{size(building - usable)} of swap while it builds"
        )


def _case(
    source: str, target: str, stack: str | None, context: int | None, batch: int, budget: int | None
) -> "tuple[Case, AnyRecipe | None, str | None]":
    """Return what is asked about, and the bundle's own recipe with a name for it."""
    from galerne.optimize.fit.choice import DEFAULT_CONTEXT, Case
    from galerne.optimize.quantize.recipe import load, names, read_resolved
    from galerne.runtime.bundle import MANIFEST, Bundle
    from galerne.targets.target import load as load_target

    chosen = load_target(target)
    used = chosen.stack(stack)
    if (Path(source) / MANIFEST).is_file():
        bundle = Bundle.open(Path(source))
        facts, graph = bundle.manifest.model, bundle.manifest.graph
        own = read_resolved(bundle.manifest.recipe, f"{Path(source) / MANIFEST}: recipe")
        named = next((name for name in names() if load(name).resolved() == own.resolved()), "its own recipe")
        asked = context if context is not None else min(DEFAULT_CONTEXT, graph.max_context or DEFAULT_CONTEXT)
        fixed = used.backend != "onnxruntime"  # there the runtime grows them
        case = Case(source, facts, chosen, used, asked, batch, graph.chunk, graph.max_context, budget, fixed)
        return case, own, named
    from galerne.export.export import DEFAULT_CHUNK
    from galerne.export.facts import read_facts

    facts, longest = read_facts(source)
    asked = context if context is not None else min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    return Case(source, facts, chosen, used, asked, batch, DEFAULT_CHUNK, longest, budget), None, None


def _text(result: "Assessment") -> str:
    chosen, case = result.chosen, result.case
    rows = [["recipe", "fits", "memory", "decode at most", "prefill at most"]]
    for name, each in result.recipes.items():
        fits = "yes" if each.fits else "no: type" if each.missing_types else "no"
        rates = (each.decode_bound_tokens_per_s, each.prefill_bound_tokens_per_s)
        rows.append([name, fits, size(each.peak_bytes), *(f"{rate:.1f} tok/s" for rate in rates)])
    parts = ", ".join(f"{part} {size(bytes_)}" for part, bytes_ in chosen.memory_bytes.items())
    longest = "any" if result.max_context is None else str(result.max_context)
    lines = [
        f"{case.name} on {case.target.title}, {case.stack.name}: batch {case.batch}, context {case.context}",
        table(rows),
        f"{result.recipe}: {parts}",
        *(f"while {what}: {size(bytes_)}" for what, bytes_ in chosen.transient_bytes.items()),
        f"limit {size(chosen.limit_bytes)}; longest context {longest}, most rows {result.max_batch}; "
        f"widest recipe that fits: {result.best or 'none'}",
    ]
    if len(result.power_modes) > 1:
        modes = ", ".join(f"{name} {rate:.1f}" for name, rate in result.power_modes.items())
        lines.append(f"decode at most, by power mode: {modes} tok/s")
    return "\n".join(lines)
