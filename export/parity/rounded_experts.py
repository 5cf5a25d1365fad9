"""Rounded inputs of a mixture's experts, whose products transformers computes from tensors that hold all experts' weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from galerne.export.parity.composed import round_input

# By expert and by the tensor in transformers: the kind and the scale of each product in it, in the order of its rows.
Roundings = dict[int, dict[str, list[tuple[str, float] | None]]]

_PARTS = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}


def experts_apart(
    rounded: Mapping[str, tuple[str, float]],
) -> tuple[dict[str, tuple[str, float]], dict[str, Roundings]]:
    """Divide what inputs are rounded to into that of plain layers, by name, and that of experts, by transformers' module.

    Args:
        rounded: by the layer's name in the checkpoint, as in "model.layers.0.block_sparse_moe.experts.3.w1".
    """
    plain: dict[str, tuple[str, float]] = {}
    experts: dict[str, Roundings] = {}
    for name, rounding in rounded.items():
        layer, found, own = name.partition(".block_sparse_moe.experts.")
        if not found:
            plain[name] = rounding
            continue
        number, part = own.split(".")
        tensor, place = _PARTS[part]
        of_expert = experts.setdefault(f"{layer}.mlp.experts", {}).setdefault(int(number), {})
        of_expert.setdefault(tensor, [None, None] if tensor == "gate_up_proj" else [None])[place] = rounding
    return plain, experts


def with_rounded_inputs(experts: nn.Module, roundings: Roundings) -> Callable[..., Any]:
    """Return the forward of transformers' module of experts with the inputs of its products rounded."""
    forward = experts.forward

    def rounding_forward(*args: Any, **named: Any) -> Any:
        with _Rounding(experts, roundings):
            return forward(*args, **named)

    return rounding_forward


class _Rounding(TorchFunctionMode):
    """Sees each product of an expert, tells by where its weight lies whose it is, and rounds the input for each of its parts."""

    def __init__(self, experts: nn.Module, roundings: Roundings) -> None:
        super().__init__()
        self._experts, self._roundings = experts, roundings

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute a product with its input rounded; anything else as it is."""
        if func is nn.functional.linear:
            x, weight = args[:2]
            for kind, whole in self._experts.named_parameters(recurse=False):
                number, rest = divmod(weight.data_ptr() - whole.data_ptr(), weight.numel() * weight.element_size())
                if rest == 0 and 0 <= number < len(whole) and weight.shape == whole.shape[1:]:
                    return _product(x, weight, self._roundings.get(number, {}).get(kind, [None]))
        return func(*args, **(kwargs or {}))


def _product(x: Tensor, weight: Tensor, roundings: list[tuple[str, float] | None]) -> Tensor:
    parts = weight.split(len(weight) // len(roundings))
    return torch.cat(
        [
            nn.functional.linear(x if each is None else round_input(x, *each), part)
            for part, each in zip(parts, roundings, strict=True)
        ],
        dim=-1,
    )
