"""Rounds a mixture's experts, each on what the tokens that its router sends there bring."""

from collections.abc import Iterator

from torch import nn

from galerne.export.calibrate.experts import BLOCK, EXPERTS, FEWEST_TOKENS, NORM, Expert, Routed
from galerne.export.calibrate.fold import Fold
from galerne.export.calibrate.rounder import Rounder
from galerne.progress import say


def round_mixture(prefix: str, layer: nn.Module, routed: Routed, rounder: Rounder) -> Iterator[None]:
    """Round the experts of a layer, and yield after each.

    What all of them read comes from one norm, so its channels have one factor for all experts, and the router's weight takes it
    up too. An expert that fewer than `FEWEST_TOKENS` tokens go to is rounded on what all tokens bring.

    Args:
        prefix: of the layer's names.
        layer: transformers' module, with `Experts` in it.
        routed: of all sequences, with everything before the experts rounded.
    """
    experts = layer.get_submodule(EXPERTS)
    assert isinstance(experts, nn.ModuleList)
    names = [f"{prefix}{BLOCK}.experts.{number}" for number in range(len(experts))]
    first = [f"{name}.{part}.weight" for name in names for part in ("w1", "w3")]
    quantized = rounder.quantized(first)
    if rounder.folds(Fold(NORM), quantized):
        whole = rounder.statistics(quantized, routed.rows(None), hessian=False)
        routed.divide(rounder.fold(prefix, Fold(NORM), [f"{prefix}{BLOCK}.gate.weight", *first], quantized, whole))
    few = {number: count for number in range(len(experts)) if (count := routed.count(number)) < FEWEST_TOKENS}
    if few:
        counts = ", ".join(f"{number} gets {count}" for number, count in few.items())
        say(f"{prefix}{BLOCK}: fewer than {FEWEST_TOKENS} tokens for some experts ({counts}): these are rounded on all")
    for number, (name, expert) in enumerate(zip(names, experts, strict=True)):
        assert isinstance(expert, Expert)
        _round_expert(prefix, name, expert, routed, None if number in few else number, rounder)
        yield


def _round_expert(prefix: str, name: str, expert: Expert, routed: Routed, tokens: int | None, rounder: Rounder) -> None:
    """Round one expert. tokens: those of which expert to round it on; None for all."""
    gate, up, down = (f"{name}.{part}.weight" for part in ("w1", "w3", "w2"))
    if first := rounder.quantized([gate, up]):
        statistics = rounder.statistics(first, routed.rows(tokens))
        for weight in first:
            rounder.round(weight, statistics)
    if last := rounder.quantized([down]):
        statistics = rounder.statistics(last, map(expert.inner, routed.rows(tokens)))
        fold = Fold(None, f"{name.removeprefix(prefix)}.w3")
        if rounder.folds(fold, last):
            rounder.fold(prefix, fold, last, last, statistics)
        rounder.round(down, statistics)
