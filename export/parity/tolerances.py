"""How far a bundle may be from its reference: one table, and where each number comes from."""

from dataclasses import dataclass
from typing import Literal

from galerne.optimize.quantize.recipe import AnyRecipe
from galerne.runtime.engines.select import CPU
from galerne.runtime.measures import Limits

Arithmetic = Literal["float32", "float16", "int8 activations", "rounded inputs", "rounded cache"]


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


# Measured on SmolLM2-135M, on examples/tiny-mistral, and on random Mistrals of 1 to 8 layers, windows of 16 to 160 and
# logits of standard deviation 0.3 to 1.7.
TABLE: dict[Arithmetic, Tolerance] = {
    "float32": Tolerance(
        max_abs=5e-4,
        max_abs_logit=1e-3,
        max_mean_kl=5e-10,
        min_top1_agreement=0.99,
        greedy=True,
        source="two float32 programs that differ in the order of their sums: measured at most 2.6e-5 standard deviations and "
        "2e-12 nats; 20 times as much is allowed, some 250 times in the divergence, and never over 1e-3 a logit",
    ),
    "float16": Tolerance(
        max_abs=0.08,
        max_abs_logit=None,
        max_mean_kl=6e-6,
        min_top1_agreement=0.95,
        greedy=False,
        source="float16 rounds each activation to 11 bits: measured at most 0.020 standard deviations and 1.4e-6 nats; four "
        "times as much is allowed. The faintest faults: rope_theta 1e6 for 1e4 gave 1.5e-5 nats in a random model, a window "
        "of 129 for 128 gave 4.4e-5 in a trained one",
    ),
    "int8 activations": Tolerance(
        max_abs=1.5,
        max_abs_logit=None,
        max_mean_kl=4e-3,
        min_top1_agreement=0.6,
        greedy=False,
        source="each block of activations is rounded to 8 bits: measured at most 0.61 standard deviations, 9.8e-4 nats and an "
        "agreement of 0.78; two to four times as much is allowed. That the graph is right, the portable verdict shows",
    ),
    "rounded inputs": Tolerance(
        max_abs=3.0,
        max_abs_logit=None,
        max_mean_kl=4e-2,
        min_top1_agreement=0.4,
        greedy=False,
        source="inputs of products are rounded to 8 bits: a value near the middle of two steps goes either way, and each layer "
        "passes that on until two programs are as far apart as the rounding puts them: measured at most 1.1 standard "
        "deviations, 1.6e-2 nats and an agreement of 0.69, with float8; some two and a half times as much is allowed. That "
        "the graph is right, the cases without the rounding show",
    ),
    "rounded cache": Tolerance(
        max_abs=0.5,
        max_abs_logit=None,
        max_mean_kl=1e-3,
        min_top1_agreement=0.7,
        greedy=False,
        source="keys and values are rounded to 8 bits, as inputs are in the row above: measured at most 0.18 standard "
        "deviations, 3.6e-4 nats and an agreement of 0.85; some three times as much is allowed. That the graph is right, the "
        "cases without the rounding show",
    ),
}


def arithmetic(recipe: AnyRecipe, engine: str) -> Arithmetic:
    """Return what a bundle of a recipe computes with in an engine.

    The reference's weights, and inputs where the checkpoint rounds them, are rounded alike, so what is left is the arithmetic's
    own error: the `cpu` engine widens floats to float32 and multiplies quantized weights with activations rounded to int8.
    """
    if recipe.activations is not None:
        return "rounded inputs"
    if engine == CPU:
        quantized = {form.dtype for form in recipe.formats if form.bits is not None}
        if quantized - {"float8e4m3fn"}:
            return "int8 activations"
        if recipe.cache is not None:
            return "rounded cache"
        # float8 is widened, and rounded to float16 in the reference only.
        return "float16" if quantized else "float32"
    if recipe.cache is not None:
        return "rounded cache"
    return "float32" if recipe.compute == "float32" else "float16"
