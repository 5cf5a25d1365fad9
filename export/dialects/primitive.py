"""Opset 20: attention, the ring's update, rotation and norms spelled out in basic operators.

For stacks that are older than those operators, such as TensorRT 10.3 on JetPack 6; `targets/operators/` has what it takes.
"""

from typing import Any

import torch
from onnx_ir import DataType
from onnxscript.values import Opset

from galerne.export.dialects.dialect import Translations, basic_attend, casts, layout

OPSET = 20
_onnx = Opset("", OPSET)


def translations(compute_type: torch.dtype) -> Translations:
    """Return how `torch.onnx.export` spells each operator of `galerne.export.ops`.

    Norms, rotation and the softmax run in float32 between casts where the graph computes in another type.
    """
    wide, back = casts(_onnx, compute_type)

    def onnx_rms_norm(x: Any, weight: Any, eps: float) -> Any:
        # In the form that ONNX Runtime and TensorRT know as one kernel.
        values = wide(x)
        variance = _onnx.ReduceMean(_onnx.Pow(values, _number(2.0)), _integers(-1))
        normed = _onnx.Mul(_onnx.Div(values, _onnx.Sqrt(_onnx.Add(variance, _number(eps)))), weight)
        return normed if x.dtype == DataType.FLOAT else back(normed)

    def onnx_rotate(x: Any, cos: Any, sin: Any) -> Any:
        # The halves change places and sin changes its sign in the first, so that all layers share what is made of sin and cos.
        x = wide(x)
        first, second = _onnx.Split(x, num_outputs=2, axis=-1)
        turned = _onnx.Concat(second, first, axis=-1)
        cos = _onnx.Unsqueeze(_onnx.Concat(cos, cos, axis=-1), _integers(1))  # [B, 1, S, D]
        sin = _onnx.Unsqueeze(_onnx.Concat(_onnx.Neg(sin), sin, axis=-1), _integers(1))
        return back(_onnx.Add(_onnx.Mul(x, cos), _onnx.Mul(turned, sin)))

    def onnx_update_ring(past: Any, new: Any, write_indices: Any) -> Any:
        # ScatterND and not ScatterElements, which needs an index for each number and is a plugin in TensorRT 10; and not
        # Where, which would read and write the whole ring for each token.
        rows, tokens = _onnx.Shape(write_indices, start=0, end=1), _onnx.Shape(new, start=2, end=3)
        heads = new.shape[1]
        slot = _onnx.Add(_onnx.Unsqueeze(write_indices, _integers(1, 2)), _counting(tokens, [1, 1, -1]))  # [B, 1, S]
        head = _onnx.Reshape(_onnx.Constant(value_ints=list(range(heads))), _integers(1, -1, 1))
        shape = _onnx.Concat(rows, _integers(heads), tokens, axis=0)
        parts = [_onnx.Expand(part, shape) for part in (_counting(rows, [-1, 1, 1]), head, slot)]
        place = _onnx.Concat(*[_onnx.Unsqueeze(part, _integers(3)) for part in parts], axis=3)  # [B, H, S, 3]
        return _onnx.ScatterND(past, place, new)

    ops = torch.ops.galerne
    return {
        **layout(_onnx),
        ops.rms_norm.default: onnx_rms_norm,
        ops.rotate.default: onnx_rotate,
        ops.update_ring.default: onnx_update_ring,
        ops.attend.default: basic_attend(_onnx, compute_type),
    }


def _number(value: float) -> Any:
    return _onnx.Constant(value_float=value)


def _integers(*values: int) -> Any:
    return _onnx.Constant(value_ints=list(values))


def _counting(count: Any, shape: list[int]) -> Any:
    """Return 0, 1, … of as many as `count` [1] says, in a shape that it broadcasts from."""
    numbers = _onnx.Range(_onnx.Constant(value_int=0), _onnx.Squeeze(count), _onnx.Constant(value_int=1))
    return _onnx.Reshape(numbers, _integers(*shape))
