"""Finds the dialect that a graph is written in: the modules of this folder named as a dialect are one each."""

import importlib
import math
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from onnx_ir import DataType
from onnxscript.values import Opset

from galerne.export import ops as _defined  # noqa: F401  defines torch.ops.galerne
from galerne.optimize.lower.tensorrt import HIDDEN
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
    # A residual stream may be float32 whatever the graph computes in.
    return (lambda x: x if x.dtype == DataType.FLOAT else onnx.Cast(x, to=1)), (lambda x: onnx.Cast(x, to=narrow))


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


def basic_attend(onnx: Opset, compute_type: torch.dtype) -> Callable[..., Any]:
    """Return attention in basic operators, with scores, softmax and softcap in float32."""
    wide, back = casts(onnx, compute_type)

    def onnx_attend(
        query: Any, keys: Any, values: Any, mask: Any, scale: float | None = None, softcap: float | None = None
    ) -> Any:
        heads, head_dim, kv_heads = query.shape[1], query.shape[3], keys.shape[1]
        # The query and not the product is scaled: it is smaller, and the product of long vectors may exceed float16. The
        # scale stays float32, so that an engine that widens the graph is not left with one that float16 rounded.
        query = back(onnx.Mul(wide(query), onnx.Constant(value_float=scale or 1 / math.sqrt(head_dim))))
        if group := (heads // kv_heads if heads > kv_heads else 0):
            # The heads that share a key head are one head with more queries, so that no key is read or copied twice.
            query = onnx.Reshape(query, onnx.Constant(value_ints=[0, kv_heads, -1, head_dim]))  # [B, Hkv, G*S, D]
            mask = onnx.Concat(*[mask] * group, axis=2)  # [B, 1, G*S, C]
        scores = wide(onnx.MatMul(query, onnx.Transpose(keys, perm=[0, 1, 3, 2])))
        if softcap is not None:
            bound = onnx.Constant(value_float=softcap)
            scores = onnx.Mul(onnx.Tanh(onnx.Div(scores, bound)), bound)
        # Where and not Add: what a slot that is not seen holds must not matter, however large.
        hidden = onnx.Constant(value_float=HIDDEN)
        weights = back(onnx.Softmax(onnx.Where(mask, scores, hidden), axis=-1))
        attended = onnx.MatMul(weights, values)
        return onnx.Reshape(attended, onnx.Constant(value_ints=[0, heads, -1, head_dim])) if group else attended

    return onnx_attend
