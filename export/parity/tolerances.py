"""How far a bundle may be from its reference: one table, and where each number comes from."""

from dataclasses import dataclass
from typing import Literal

from galerne.optimize.quantize.recipe import Recipe
from galerne.runtime.engines.select import CPU

Arithmetic = Literal["float32", "float16", "int8 activations"]


@dataclass(frozen=True)
class Tolerance:
    """What the logits of a case must keep to.

    max_abs: the largest difference between two logits. In units of the logits where `relative` is off, else in standard
        deviations of the reference's logits: those of a random model spread over 0.3, those of a trained one over 5.
    max_mean_kl: the mean over positions of KL(reference, bundle) in nats.
    min_top1_agreement: the share of positions whose likeliest token is the same. One position a case may always differ,
        since two tokens can be as good as equal.
    greedy: whether 256 tokens of free generation must be the reference's.
    source: where the numbers come from.
    """

    max_abs: float
    relative: bool
    max_mean_kl: float
    min_top1_agreement: float
    greedy: bool
    source: str


TABLE: dict[Arithmetic, Tolerance] = {
    "float32": Tolerance(1e-3, False, 1e-6, 0.99, True, "TBD"),
    "float16": Tolerance(0.02, True, 1e-3, 0.9, False, "TBD"),
    "int8 activations": Tolerance(0.2, True, 1e-2, 0.5, False, "TBD"),
}


def arithmetic(recipe: Recipe, engine: str) -> Arithmetic:
    """Return what a bundle of a recipe computes with in an engine.

    The reference's weights are rounded as the recipe rounds them, so what is left is the arithmetic's own error: the `cpu`
    engine widens floats to float32 and multiplies quantized weights with activations rounded to int8.
    """
    if engine == CPU:
        return "float32" if recipe.weights.bits is None else "int8 activations"
    return "float32" if recipe.compute == "float32" else "float16"
