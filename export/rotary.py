"""Rotary positions: from what a config says of them to the angle that each pair of channels turns by at a position."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from galerne.errors import InputError
from galerne.export.reader import ConfigReader


@dataclass(frozen=True)
class Rotary:
    """The rotation of queries and keys in one kind of layer.

    theta: the base that the frequencies were made from.
    frequencies: the angle per position of each rotated pair of channels, in radians, float32. Two channels of a head for
        each: with fewer than half of the head's channels the last ones are not rotated.
    scale: what cosine and sine are multiplied by.
    limit: the longest text in tokens that the source rotates by these frequencies; None where there is no limit.
    """

    theta: float
    frequencies: tuple[float, ...]
    scale: float = 1.0
    limit: int | None = None


def read_rotary(config: ConfigReader, head_dim: int, layer_type: str | None = None) -> Rotary:
    """Read the rotation of a layer.

    transformers 5 writes it under `rope_parameters`, checkpoints made before that as `rope_theta` and `rope_scaling`.

    Args:
        head_dim: channels of a head.
        layer_type: the entry of `rope_parameters` to read, where it has one for each type of layer.
    Raises: InputError if a number is missing that changes the answer, or the scaling is of a kind that is not supported.
    Source: RoFormer (arXiv 2104.09864); transformers 5.24, modeling_rope_utils.py.
    """
    table = config.table("rope_scaling") or config.table("rope_parameters") or config.table_of("rope_parameters", {})
    if layer_type is not None:
        table = table.table(layer_type) or table
    kind = table.text("rope_type") or table.text("type") or "default"
    if kind not in _SCALINGS:
        known = ", ".join(map(repr, _SCALINGS))
        raise InputError(f"{table.where}: rope_type {kind!r} is not supported; expected one of {known}")
    theta = table.number("rope_theta") if table.has("rope_theta") else config.number("rope_theta")
    partial = next((at.number(key) for at in (table, config) if at.has(key := "partial_rotary_factor")), 1.0)
    rotated = int(head_dim * partial)
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise InputError(
            f"{config.where}: {rotated} of {head_dim} channels are rotated; expected an even number of them"
        )
    exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    frequencies = torch.reciprocal(torch.pow(theta, exponents))
    frequencies, scale, limit = _SCALINGS[kind](table, config, theta, frequencies)
    return Rotary(theta, tuple(frequencies.tolist()), scale, limit)


_Scaled = tuple[Tensor, float, int | None]


def _default(table: ConfigReader, config: ConfigReader, theta: float, frequencies: Tensor) -> _Scaled:
    return frequencies, 1.0, None


def _linear(table: ConfigReader, config: ConfigReader, theta: float, frequencies: Tensor) -> _Scaled:
    return frequencies / table.number("factor"), 1.0, None


def _llama3(table: ConfigReader, config: ConfigReader, theta: float, frequencies: Tensor) -> _Scaled:
    """Slow frequencies are divided, fast ones are not, and those between are blended."""
    factor, length = table.number("factor"), table.integer("original_max_position_embeddings")
    slow, fast = table.number("low_freq_factor"), table.number("high_freq_factor")
    wavelengths = 2 * math.pi / frequencies
    divided = torch.where(wavelengths > length / slow, frequencies / factor, frequencies)
    blend = (length / wavelengths - slow) / (fast - slow)
    blended = (1 - blend) * divided / factor + blend * divided
    between = (wavelengths >= length / fast) & (wavelengths <= length / slow)
    return torch.where(between, blended, divided), 1.0, None


def _yarn(table: ConfigReader, config: ConfigReader, theta: float, frequencies: Tensor) -> _Scaled:
    """Source: YaRN (arXiv 2309.00071)."""
    factor, length = table.number("factor"), table.integer("original_max_position_embeddings")
    rotated = 2 * len(frequencies)

    def channel(rotations: float) -> float:
        return rotated * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = channel(table.number("beta_fast", 32.0))
    last = channel(table.number("beta_slow", 1.0))
    if table.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    ramp = (torch.arange(rotated // 2, dtype=torch.float32) - first) / (last - first or 0.001)
    kept = 1 - torch.clamp(ramp, 0, 1)
    scaled = torch.reciprocal(factor * torch.reciprocal(frequencies)) * (1 - kept) + frequencies * kept
    return scaled, _yarn_scale(table, factor), None


def _yarn_scale(table: ConfigReader, factor: float) -> float:
    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if table.has("attention_factor"):
        return table.number("attention_factor")
    if table.has("mscale") and table.has("mscale_all_dim"):
        return scale(table.number("mscale")) / scale(table.number("mscale_all_dim"))
    return scale(1.0)


def _longrope(table: ConfigReader, config: ConfigReader, theta: float, frequencies: Tensor) -> _Scaled:
    """The short factors, which hold up to the length that the model was first trained for.

    For a longer text the source takes the long factors, for all of its positions, and so throws away the keys that it has
    rotated. A ring keeps rotated keys, so what holds here is the length up to which both are the same.

    Source: LongRoPE (arXiv 2402.13753).
    """
    at = config if config.has("original_max_position_embeddings") else table
    length = at.integer("original_max_position_embeddings")
    factors = torch.tensor(table.numbers("short_factor", len(frequencies)))
    stretch = table.number("factor", config.integer("max_position_embeddings") / length)
    usual = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(length))
    scaled = torch.reciprocal(factors * torch.reciprocal(frequencies))
    return scaled, table.number("attention_factor", usual), length


_SCALINGS: dict[str, Callable[[ConfigReader, ConfigReader, float, Tensor], _Scaled]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
