"""What compressed-tensors' `quantization_config` says of each weight's type and of its input's.

Source: compressed-tensors 0.20, quantization/quant_config.py and utils/match.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from galerne.errors import InputError
from galerne.export.checkpoint.packed import InputKind
from galerne.runtime.manifest import CacheType

PACKED, PLAIN = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
# What stands for no format: several, or, where only the cache is rounded, none.
_ANY = ("mixed-precision", "dense")
_LINEAR = "Linear"


@dataclass(frozen=True)
class Group:
    """A group of weights that are quantized alike.

    targets: the names of the layers, patterns of names after "re:", or the class "Linear".
    bits: of a weight.
    block: of the weights that share a scale, (out, in); None where they lie in no square blocks.
    input_kind: what the layers' inputs are rounded to by a scale that is stored; None where they are not.
    left_out: which rounding of the source is not kept.
    """

    targets: tuple[str, ...]
    bits: int
    block: tuple[int, ...] | None
    input_kind: InputKind | None
    left_out: frozenset[str]


@dataclass(frozen=True)
class CompressedConfig:
    """The groups, and what of the source's rounding is not kept.

    cache: what keys and values are rounded to, by scales that are stored; None where they are not.
    """

    groups: tuple[Group, ...]
    left_out: frozenset[str]
    cache: CacheType | None

    def input_kind(self, module: str) -> InputKind | None:
        """Return what a layer's input is rounded to: its own name goes before a pattern, and that before its class."""
        groups = {target: group for group in self.groups for target in group.targets}
        patterns = sorted(target for target in groups if target.startswith("re:") and re.match(target[3:], module))
        found = next((groups[target] for target in (module, *patterns, _LINEAR) if target in groups), None)
        return None if found is None else found.input_kind


def read_config(config: Mapping[str, Any], at: str) -> CompressedConfig:
    """Read a `quantization_config`; `at` says where it stands. Raises: InputError if it is of a form that is not read."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise InputError(f"{at}: config_groups: expected a table of tables, found {groups!r}")
    for form in {config.get("format"), *(group.get("format") for group in groups.values())} - {None, *_ANY}:
        if form not in (PACKED, *PLAIN):
            raise InputError(f"{at}: format: {form!r} is not supported; expected {', '.join((PACKED, *PLAIN))}")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise InputError(f"{at}: transform_config: weights that were rotated are not supported; quantize without")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise InputError(f"{at}: sparsity_config: format {sparsity!r} is not supported; expected 'dense'")
    read = tuple(_group(group, f"{at}: config_groups: {name}") for name, group in groups.items())
    left_out = {reason for group in read for reason in group.left_out}
    cache = config.get("kv_cache_scheme")
    rounded = _is_int8_cache(cache, f"{at}: kv_cache_scheme")
    if cache is not None and not rounded:
        left_out.add("the cache otherwise than to int8 by one scale of a tensor without zero points")
    return CompressedConfig(read, frozenset(left_out), "int8" if rounded else None)


def _is_int8_cache(args: object, at: str) -> bool:
    if args is None:
        return False
    if not isinstance(args, Mapping):
        raise InputError(f"{at}: expected a table, found {args!r}")
    static = args.get("dynamic", False) is False and args.get("symmetric", True) is True
    return static and _kind(args) == ("int", 8) and (args.get("strategy") or "tensor") == "tensor"


def _group(group: Mapping[str, Any], at: str) -> Group:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise InputError(f"{at}: weights: expected a table, found {weights!r}")
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        raise InputError(
            f"{at}: weights: num_bits: {bits!r} of type {kind!r} is not supported; expected int 4 or 8, float 8"
        )
    targets = group.get("targets", [_LINEAR])
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{at}: targets: expected a list of names, found {targets!r}")
    for target in targets:
        _check_pattern(target, at)
    input_kind, left_out = _activations(group.get("input_activations"), at)
    if group.get("output_activations") is not None:
        left_out |= {"outputs"}
    block = tuple(weights.get("block_structure") or ()) if weights.get("strategy") == "block" else None
    return Group(tuple(targets), cast(int, bits), block, input_kind, left_out)


def _check_pattern(target: str, at: str) -> None:
    try:
        re.compile(target.removeprefix("re:"))
    except re.error as exc:
        raise InputError(f"{at}: targets: {target!r} is no regular expression ({exc})") from exc


def _activations(args: object, at: str) -> tuple[InputKind | None, frozenset[str]]:
    """Return what inputs are rounded to, or why they are not."""
    if args is None:
        return None, frozenset()
    if not isinstance(args, Mapping):
        raise InputError(f"{at}: input_activations: expected a table, found {args!r}")
    if args.get("dynamic", False) is not False:
        return None, frozenset({"activations by scales found as they come (dynamic), which TensorRT does not take"})
    kind = {("int", 8): "int8", ("float", 8): "float8e4m3fn"}.get(_kind(args))
    if kind is None or (args.get("strategy") or "tensor") != "tensor" or args.get("symmetric", True) is not True:
        return None, frozenset({"activations otherwise than to 8 bits by one scale of a tensor without zero points"})
    return cast(InputKind, kind), frozenset()


def _kind(args: Mapping[str, Any]) -> tuple[Any, Any]:
    return args.get("type", "int"), args.get("num_bits", 8)
