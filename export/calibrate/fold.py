"""Factors on the input channels of products that whatever comes before them undoes, so that the model computes what it did.

AWQ and SmoothQuant multiply a weight's columns; the channels of its input are divided by as much where they are made: in the
norm before q, k, v and before gate, up; in v's rows before o; in up's rows before down. Where several heads share a value, the
channels of o that read one row of v share a factor.
"""

from dataclasses import dataclass

import numpy as np
import torch

from galerne.export.calibrate.layers import Float32, Group
from galerne.export.calibrate.rounded import RoundedWeight
from galerne.export.calibrate.source import LayerWeights
from galerne.export.spec import DecoderSpec

# Scales stay normal numbers of float16, whose precision is the same for all.
_SMALLEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class Fold:
    """Where the factors of a group's input go.

    norm: a norm within the layer; or product, first: the rows of a product from `first` on.
    readers, width: how many channels of the input read each of those places, where that is more than one: with places in
        rows of `width`, each row is read `readers` times before the next.
    """

    norm: str | None
    product: str = ""
    first: int = 0
    readers: int = 1
    width: int = 1

    def by_place(self, of_channels: Float32) -> Float32:
        """Bring values by input channel, [n, in], into rows by place, [n * readers, places]."""
        parts = of_channels.reshape(len(of_channels), -1, self.readers, self.width)
        return parts.swapaxes(1, 2).reshape(len(of_channels) * self.readers, -1)

    def by_channel(self, of_places: Float32) -> Float32:
        """Give each input channel the value of its place: [places] to [in]."""
        return np.repeat(of_places.reshape(-1, 1, self.width), self.readers, axis=1).reshape(-1)


def fold_of(group: Group, spec: DecoderSpec) -> Fold | None:
    """Return where a group's factors go; None where nothing can undo them."""
    if group.norm is not None:
        return Fold(group.norm)
    if group.products == ("self_attn.o_proj",):
        heads, shared = spec.num_attention_heads, spec.num_attention_heads // spec.num_key_value_heads
        if spec.fused_projections:
            first = (heads + spec.num_key_value_heads) * spec.head_dim
            return Fold(None, "self_attn.qkv_proj", first, shared, spec.head_dim)
        return Fold(None, "self_attn.v_proj", 0, shared, spec.head_dim)
    if group.products == ("mlp.down_proj",):
        if spec.fused_projections:
            return Fold(None, "mlp.gate_up_proj", spec.intermediate_size)
        return Fold(None, "mlp.up_proj")
    return None


def bounded(factors: Float32, fold: Fold, prefix: str, rounded: dict[str, RoundedWeight]) -> Float32:
    """Return factors [places] so small that no scale of the rows that they divide becomes too small for float16."""
    made = rounded.get(f"{prefix}{fold.product}.weight")
    if fold.norm is not None or made is None:
        return factors
    smallest = made.scales[fold.first : fold.first + len(factors)].min(axis=1).astype(np.float32)
    limited: Float32 = np.minimum(factors, np.maximum(smallest / np.float32(_SMALLEST_SCALE), 1))
    return limited


def divide(
    factors: Float32,
    fold: Fold,
    prefix: str,
    spec: DecoderSpec,
    weights: LayerWeights,
    rounded: dict[str, RoundedWeight],
) -> None:
    """Divide what a group's input comes from by factors [places], in place.

    Args:
        prefix: of the layer's names.
        rounded: the layer's weights that were rounded before, by name.
    """
    by = torch.from_numpy(factors)
    if fold.norm is not None:
        name = f"{prefix}{fold.norm}.weight"
        weights.replace(name, (weights(name) + spec.norm_offset) / by - spec.norm_offset)
        return
    rows = slice(fold.first, fold.first + len(factors))
    name = f"{prefix}{fold.product}.weight"
    if name in rounded:
        rounded[name] = rounded[name].divided(fold.first, factors)
        weights.replace(name, torch.from_numpy(rounded[name].dequantized()))
    else:
        whole = weights(name).clone()
        whole[rows] /= by[:, None]
        weights.replace(name, whole)
    bias = f"{prefix}{fold.product}.bias"
    if weights.has(bias):
        whole = weights(bias).clone()
        whole[rows] /= by
        weights.replace(bias, whole)
