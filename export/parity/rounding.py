"""A checkpoint's weights as a recipe rounds them, for a PyTorch model that must match a bundle."""

import torch

from galerne.optimize.quantize.recipe import AnyRecipe
from galerne.optimize.quantize.rounding import dequantize, round_to, scales_of
from galerne.optimize.quantize.search import scales_by
from galerne.runtime.footprint import TABLE


def rounded_like(tensor: torch.Tensor, name: str, recipe: AnyRecipe, first: int = 0) -> torch.Tensor:
    """Return a checkpoint's tensor as the recipe stores it, widened again, for a PyTorch model that must match a bundle.

    Args:
        tensor: [out, in] for a linear weight, [experts, out, in] for those of several experts, float32.
        name: of the tensor in transformers.
        first: the number of the first of its experts.
    """
    if tensor.ndim == 3:
        return torch.stack([_rounded_expert(part, name, number, recipe) for number, part in enumerate(tensor, first)])
    if name.endswith(".bias"):
        return tensor.to(getattr(torch, recipe.compute)).float()
    if tensor.ndim != 2:
        return tensor
    form = recipe.table if name == TABLE else recipe.format_for(name)
    if form.bits is None:
        return tensor.to(getattr(torch, form.dtype)).float()
    block = form.block_for(tensor.shape[1], name)
    weight = tensor.numpy()
    find = scales_of if form.bits == 8 else scales_by(recipe.method, form.bits)  # at 8 bits all methods round alike
    scale = find(weight, form.bits, block)
    return torch.from_numpy(dequantize(round_to(weight, scale, form.bits), scale))


def _rounded_expert(tensor: torch.Tensor, name: str, number: int, recipe: AnyRecipe) -> torch.Tensor:
    """Round an expert's weights, which transformers has side by side: [gate and up, in] or [out, in]."""
    parts = expert_names(name, number)
    rows = torch.split(tensor, len(tensor) // len(parts))
    return torch.cat([rounded_like(part, own, recipe) for part, own in zip(rows, parts, strict=True)])


def expert_names(name: str, number: int) -> tuple[str, ...]:
    """Return the names in the checkpoint of the weights of an expert, of which transformers makes one.

    Args:
        name: in transformers, ending in `mlp.experts.gate_up_proj` or `mlp.experts.down_proj`.
    """
    layer, _, kind = name.partition(".mlp.experts.")
    fields = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[kind]
    return tuple(f"{layer}.block_sparse_moe.experts.{number}.{field}.weight" for field in fields)
