"""Rounding against its definition, and against ONNX Runtime's own DequantizeLinear."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from galerne.optimize.quantize.rounding import dequantize, pack_int4, quantize


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.02


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([4, 8]), block=st.sampled_from([32, 64, 128]), seed=st.integers(0, 10_000))
def test_no_weight_is_further_than_half_a_step(bits: int, block: int, seed: int) -> None:
    weight = weights(3, 2 * block, seed)
    values, scale = quantize(weight, bits, block)
    low, high = {4: (-8, 7), 8: (-127, 127)}[bits]
    assert values.min() >= low and values.max() <= high
    step = np.repeat(scale.astype(np.float32), block, axis=1)
    # The scale itself is rounded to float16, so the outermost weight may be clipped by that much more.
    assert np.all(np.abs(dequantize(values, scale) - weight) <= step * 0.5 + np.abs(weight) * 2**-10)


def test_the_whole_range_is_used() -> None:
    weight = np.array([[-0.8, 0.1, 0.2, 0.7]], np.float32)
    values, scale = quantize(weight, 4, 4)
    assert values.tolist() == [[-8, 1, 2, 7]]
    assert scale.tolist() == [[np.float16(0.1)]]


def test_zeros_stay_zero_with_a_positive_scale() -> None:
    values, scale = quantize(np.zeros((2, 64), np.float32), 4, 32)
    assert not values.any()
    assert (scale == 1).all()


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 128), (8, 256)])
def test_onnx_runtime_reads_the_same_weights(bits: int, block: int) -> None:
    weight = weights(6, 256)
    values, scale = quantize(weight, bits, block)
    stored = helper.make_tensor(
        "w",
        TensorProto.INT4 if bits == 4 else TensorProto.INT8,
        [256, 6],
        (pack_int4(np.ascontiguousarray(values.T)) if bits == 4 else np.ascontiguousarray(values.T)).tobytes(),
        raw=True,
    )
    scales = onnx.numpy_helper.from_array(
        scale.T.astype(np.float32) if bits == 4 else scale[:, 0].astype(np.float32), "s"
    )
    attributes: dict[str, Any] = {"axis": 0, "block_size": block} if bits == 4 else {"axis": 1}
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [256, 6])
    model = helper.make_model(
        helper.make_graph([node], "g", [], [output], [stored, scales]),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {})[0].T, dequantize(values, scale))


def test_packing_puts_the_first_value_in_the_low_bits() -> None:
    assert pack_int4(np.array([[1, -1], [-8, 7]], np.int8)).tolist() == [0xF1, 0x78]
    assert pack_int4(np.array([3], np.int8)).tolist() == [0x03]
