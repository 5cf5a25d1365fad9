"""`galerne recipe`: which weights to store in how many bits, for a size, a device or a divergence."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from galerne.cli.output import CheckpointPath, Json, Stack, emit, parse_bytes, size
from galerne.errors import InputError

if TYPE_CHECKING:
    from galerne.export.checkpoint.checkpoint import Checkpoint
    from galerne.export.sensitivity.choose import Chosen
    from galerne.export.sensitivity.limits import Limit
    from galerne.optimize.quantize.recipe import Recipe
    from galerne.runtime.manifest import ModelFacts


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(recipe)


def recipe(
    checkpoint: CheckpointPath,
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="Text like what the model will see, UTF-8.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(metavar="TOML", help="The recipe's file; it must not exist yet.", show_default=False)
    ],
    max_size: Annotated[
        str | None, typer.Option(metavar="BYTES", help="The most that weights.bin may take, such as 80MB or 1.2GB.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="A target that it has to fit, as `galerne fit` counts.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(metavar="NATS", help="The most KL from the source, on text that is held out.")
    ] = None,
    base: Annotated[
        str, typer.Option("--recipe", help="A recipe's name or .toml file: how weights are rounded.")
    ] = "int4-rtn",
    stack: Stack = None,
    context: Annotated[
        int | None, typer.Option(help="With --target: tokens of each row.", show_default="4096, or the longest")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="With --target: rows at once.", show_default="1")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to choose by, and as many to measure the choice.", min=2)] = 2048,
    length: Annotated[int, typer.Option(help="Tokens of one sequence.", min=2)] = 256,
    json: Json = False,
) -> None:
    """Choose by measurement which weights take int4, int8 or float16, and write that as a recipe for `galerne export`."""
    from galerne.export.checkpoint.open import open_checkpoint
    from galerne.export.facts import read_facts
    from galerne.export.sensitivity.choose import choose
    from galerne.export.sensitivity.recipe_file import recipe_toml
    from galerne.files import write_atomic
    from galerne.optimize.quantize.recipe import load

    if sum(limit is not None for limit in (max_size, target, max_kl)) != 1:
        raise InputError("recipe: expected one of --max-size, --target and --max-kl")
    if target is None and (stack, context, batch) != (None, None, None):
        raise InputError("--stack, --context and --batch: go with --target; leave them out")
    if out.suffix != ".toml" or out.exists() or not out.parent.is_dir():
        raise InputError(f"--out {out}: expected a .toml file that does not exist yet, in a folder that does")
    source = open_checkpoint(checkpoint)
    facts, longest = read_facts(str(checkpoint))
    rounding = load(base)
    limit = _limit(source, facts, longest, rounding, max_size, max_kl, target, stack, context, batch)
    chosen = choose(source, facts, text, rounding, limit, tokens=tokens, length=length)
    write_atomic(out, recipe_toml(chosen).encode())
    emit(json, _data(out, chosen), _text(out, chosen))


def _limit(
    checkpoint: "Checkpoint",
    facts: "ModelFacts",
    longest: int | None,
    base: "Recipe",
    max_size: str | None,
    max_kl: float | None,
    target: str | None,
    stack: str | None,
    context: int | None,
    batch: int | None,
) -> "Limit":
    from galerne.export.export import DEFAULT_CHUNK
    from galerne.export.sensitivity.groups import other_bytes
    from galerne.export.sensitivity.limits import DivergenceLimit, SizeLimit, TargetLimit
    from galerne.optimize.fit.choice import DEFAULT_CONTEXT, Case
    from galerne.targets.target import load as load_target

    if max_size is not None:
        return SizeLimit(parse_bytes("--max-size", max_size), other_bytes(facts, checkpoint, base.table))
    if max_kl is not None:
        if not 0 < max_kl < float("inf"):
            raise InputError(f"--max-kl: expected nats above 0, found {max_kl}")
        return DivergenceLimit(max_kl)
    assert target is not None
    chosen = load_target(target)
    asked = context if context is not None else min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    name, rows = str(checkpoint.path), 1 if batch is None else batch
    case = Case(name, facts, chosen, chosen.stack(stack), asked, rows, DEFAULT_CHUNK, longest)
    case.check_context()
    return TargetLimit(case)


def _data(out: Path, chosen: "Chosen") -> dict[str, Any]:
    import numpy as np

    from galerne.export.sensitivity.recipe_file import label

    measured = chosen.measured
    return {
        "recipe": str(out),
        "description": chosen.recipe.description,
        "weights_bytes": chosen.weights_bytes,
        "predicted_kl": chosen.predicted_kl,
        "mean_kl": float(measured.kl.mean()),
        "p99_kl": float(np.percentile(measured.kl, 99)),
        "top1_agreement": float(measured.agrees.mean()),
        "tokens": chosen.tokens,
        "held_out_tokens": chosen.held_out_tokens,
        "groups": [
            {
                "match": group.match,
                "format": label(option.format),
                "harm": {label(form): harm for form, harm in harms.items()},
            }
            for group, option, harms in zip(chosen.groups, chosen.mix.options, chosen.harms, strict=True)
        ],
    }


def _text(out: Path, chosen: "Chosen") -> str:
    from galerne.export.sensitivity.recipe_file import label

    counts: dict[str, int] = {}
    for group, option in zip(chosen.groups, chosen.mix.options, strict=True):
        counts[label(option.format)] = counts.get(label(option.format), 0) + group.count
    total = sum(counts.values())
    shares = ", ".join(
        f"{count / total:.0%} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    return (
        f"{out}: {chosen.recipe.description}\n"
        f"weights     {size(chosen.weights_bytes)}: {shares}\n"
        f"KL          {float(chosen.measured.kl.mean()):.3g} nats, predicted {chosen.predicted_kl:.3g}\n"
        f"top-1       {float(chosen.measured.agrees.mean()):.2%} the same"
    )
