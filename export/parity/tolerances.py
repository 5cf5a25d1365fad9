"""How far a bundle may be from its reference: one table, and where each number comes from."""

from dataclasses import dataclass
from typing import Literal

from galerne.optimize.quantize.recipe import Recipe
from galerne.runtime.engines.select import CPU

Arithmetic = Literal["float32", "float16", "int8 activations"]


@dataclass(frozen=True)
class Limits:
    """What the logits of every case must keep to.

    max_abs: the largest difference between two logits.
    max_mean_kl: the mean over positions of KL(reference, bundle) in nats.
    min_top1_agreement: the share of positions whose likeliest token is the same. One position a case may always differ,
        since two tokens can be as good as equal.
    greedy: whether the tokens of free generation must be the reference's.
    source: where the numbers come from.
    """

    max_abs: float
    max_mean_kl: float
    min_top1_agreement: float
    greedy: bool
    source: str


@dataclass(frozen=True)
class Tolerance:
    """A row of the table, in units of the reference's logits: their spread is 0.2 in a random model and 5 in a trained one.

    max_abs: in standard deviations of the reference's logits.
    max_abs_logit: in the logits' own unit; where both are given, the smaller one holds.
    max_mean_kl: in nats for logits of standard deviation 1; the divergence grows with the square of it.
    """

    max_abs: float
    max_abs_logit: float | None
    max_mean_kl: float
    min_top1_agreement: float
    greedy: bool
    source: str

    def limits(self, logits_std: float) -> Limits:
        """Return the row's limits for logits of a standard deviation."""
        max_abs = self.max_abs * logits_std
        if self.max_abs_logit is not None:
            max_abs = min(max_abs, self.max_abs_logit)
        return Limits(max_abs, self.max_mean_kl * logits_std**2, self.min_top1_agreement, self.greedy, self.source)


TABLE: dict[Arithmetic, Tolerance] = {
    "float32": Tolerance(1e-3, 1e-3, 1e-9, 0.99, True, "TBD"),
    "float16": Tolerance(0.06, None, 3e-6, 0.9, False, "TBD"),
    "int8 activations": Tolerance(0.3, None, 1e-3, 0.7, False, "TBD"),
}


def arithmetic(recipe: Recipe, engine: str) -> Arithmetic:
    """Return what a bundle of a recipe computes with in an engine.

    The reference's weights are rounded as the recipe rounds them, so what is left is the arithmetic's own error: the `cpu`
    engine widens floats to float32 and multiplies quantized weights with activations rounded to int8.
    """
    if engine == CPU:
        return "float32" if recipe.weights.bits is None and recipe.lm_head.bits is None else "int8 activations"
    return "float32" if recipe.compute == "float32" else "float16"
