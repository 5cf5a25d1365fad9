"""How far float16 moves a model's logits, as transformers itself shows: for models that amplify what each layer rounds."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.cases import Plan
from galerne.export.parity.reference import Float32, logits_at
from galerne.export.parity.streamed import StreamedModel
from galerne.export.parity.tolerances import TABLE
from galerne.optimize.quantize.recipe import AnyRecipe
from galerne.runtime.measures import Limits, kl, largest_difference, top1_agreement

# As in the table's row: the same sums in another order, and attention's own steps, round otherwise.
_MARGIN = 4


def float16_logits(
    checkpoint: Checkpoint, recipe: AnyRecipe, plan: Plan, adapter: Path | None, *, rounded_inputs: bool
) -> Float32:
    """Return the reference's logits of the plan's longest case, with what each module of a layer returns rounded to float16.

    Args:
        adapter, rounded_inputs: as in `StreamedModel`.
    Returns: [positions, vocab_size].
    """
    streamed = StreamedModel(checkpoint, adapter, rounded_inputs=rounded_inputs)
    streamed.rounding = recipe
    for name, module in streamed.model.named_modules():
        if name.startswith("model.layers.") or name == "model.norm":
            module.register_forward_hook(_round)
    tokens = plan.sequences[0][: plan.longest.lengths[0]]
    return logits_at(streamed.model, tokens, plan.positions(plan.longest)[0])


def widened(limits: Limits, reference: Float32, rounded: Float32, logits_std: float) -> Limits:
    """Return limits that allow as much as float16 does to the reference itself, some times over; never narrower ones.

    What float16 does counts up to what the table allows activations of 8 bits: a model that it harms more is not fit for it.

    Args:
        reference, rounded: logits [positions, vocab_size] in float32, and as `float16_logits` returns them.
        logits_std: the standard deviation of the reference's logits.
    Returns: the limits as they are where the rounded logits are not finite, or not further off.
    """
    if not np.isfinite(rounded).all():
        return limits
    most = TABLE["int8 activations"].limits(logits_std)
    max_abs, mean_kl = largest_difference(reference, rounded), kl(reference, rounded)
    agreement = top1_agreement(reference, rounded)
    wider = dataclasses.replace(
        limits,
        max_abs=max(limits.max_abs, min(_MARGIN * max_abs, most.max_abs)),
        max_mean_kl=max(limits.max_mean_kl, min(_MARGIN * mean_kl, most.max_mean_kl)),
        min_top1_agreement=min(limits.min_top1_agreement, max(1 - _MARGIN * (1 - agreement), most.min_top1_agreement)),
    )
    if wider == limits:
        return limits
    return dataclasses.replace(
        wider,
        source=f"the model amplifies what its layers round: in transformers, with what each module returns rounded to float16, "
        f"its logits move by {max_abs / logits_std:.2g} standard deviations and {mean_kl:.2g} nats; four times as much is "
        "allowed, as bundles of such models differed by 0.5 to 1.5 times as much. Faults fainter than that do not show here, "
        "but in a bundle of the recipe fp32",
    )


def _round(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_rounded, output))
    return _rounded(output)


def _rounded(value: Any) -> Any:
    return value.half().float() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
