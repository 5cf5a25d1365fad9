"""Finds the dialect that a graph is written in: the modules of this folder named as a dialect are one each."""

import importlib
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from onnxscript.values import Opset

from galerne.export import ops as _defined  # noqa: F401  defines torch.ops.galerne
from galerne.runtime.manifest import Dialect

Translations = dict[Callable[..., Any], Callable[..., Any]]
Cast = Callable[[Any], Any]


class DialectModule(Protocol):
    """What a dialect's module offers: its ONNX opset, and the spelling of every operator in it."""

    OPSET: int

    def translations(self, compute_type: torch.dtype) -> Translations: ...


def dialect_module(name: Dialect) -> DialectModule:
    """Return the module of a dialect."""
    return cast(DialectModule, importlib.import_module(f"galerne.export.dialects.{name}"))


def casts(onnx: Opset, compute_type: torch.dtype) -> tuple[Cast, Cast]:
    """Return what casts a value to float32 and what casts it back to `compute_type`; both do nothing for float32."""
    narrow = {torch.float16: 10, torch.bfloat16: 16}.get(compute_type)  # onnx.TensorProto's numbers of the types
    if narrow is None:
        return (lambda x: x), (lambda x: x)
    return (lambda x: onnx.Cast(x, to=1)), (lambda x: onnx.Cast(x, to=narrow))


def layout(onnx: Opset) -> Translations:
    """Return the operators that only move values or count positions: every dialect spells them alike."""

    def onnx_split_heads(x: Any, heads: int, head_dim: int) -> Any:
        return onnx.Transpose(onnx.Reshape(x, onnx.Constant(value_ints=[0, 0, heads, head_dim])), perm=[0, 2, 1, 3])

    def onnx_merge_heads(x: Any) -> Any:
        return onnx.Reshape(onnx.Transpose(x, perm=[0, 2, 1, 3]), onnx.Constant(value_ints=[0, 0, -1]))

    def onnx_held_positions(position_ids: Any, ring: Any) -> Any:
        newest = onnx.Gather(position_ids, onnx.Constant(value_ints=[-1]), axis=1)
        capacity = onnx.Squeeze(onnx.Shape(ring, start=2, end=3))
        slots = onnx.Range(onnx.Constant(value_int=0), capacity, onnx.Constant(value_int=1))
        return onnx.Sub(newest, onnx.Mod(onnx.Sub(newest, slots), capacity))

    def onnx_select_positions(x: Any, indices: Any) -> Any:
        return onnx.GatherND(x, onnx.Unsqueeze(indices, onnx.Constant(value_ints=[-1])), batch_dims=1)

    ops = torch.ops.galerne
    return {
        ops.split_heads.default: onnx_split_heads,
        ops.merge_heads.default: onnx_merge_heads,
        ops.held_positions.default: onnx_held_positions,
        ops.select_positions.default: onnx_select_positions,
    }
