"""Which of the builders takes nvfp4 weights, spelled in ONNX's own operators: docs/checkpoints.md says what came of it."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

ROWS, COLUMNS, BLOCK = 1024, 1024, 16


@pytest.fixture(scope="module")
def fp4_product() -> bytes:
    """Return a product of float4 weights in blocks of 16, with float8 scales that have a float16 scale themselves."""
    random = np.random.default_rng(0)
    values = random.integers(0, 256, ROWS * COLUMNS // 2).astype(np.uint8).tobytes()
    scales = random.uniform(1, 100, (ROWS // BLOCK, COLUMNS)).astype(ml_dtypes.float8_e4m3fn)
    initializers = [
        helper.make_tensor("values", TensorProto.FLOAT4E2M1, [ROWS, COLUMNS], values, raw=True),
        numpy_helper.from_array(scales, "scales"),
        numpy_helper.from_array(np.array(0.001, np.float16), "scale_of_scales"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["scales", "scale_of_scales"], ["wide_scales"]),
        helper.make_node("DequantizeLinear", ["values", "wide_scales"], ["weight"], axis=0, block_size=BLOCK),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["S", size])
        for name, size in (("x", ROWS), ("y", COLUMNS))
    )
    graph = helper.make_graph(nodes, "fp4", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def test_onnxruntime_has_no_kernel(fp4_product: bytes) -> None:
    """Once this fails, a bundle with nvfp4 weights could run here, and a recipe is worth having."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        ort.InferenceSession(fp4_product, options, providers=["CPUExecutionProvider"])


@pytest.mark.tensorrt
@pytest.mark.parametrize(("capability", "builds"), [("SM89", False), ("SM120", True)])
def test_tensorrt_rtx_builds_it_for_blackwell(
    fp4_product: bytes, tmp_path: Path, capability: str, builds: bool
) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX's Python package is not installed")
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(0)
    assert trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR)).parse(fp4_product)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", (1, ROWS), (1, ROWS), (64, ROWS))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    engine = builder.build_serialized_network(network, config)
    assert (engine is not None) == builds
    if engine is not None:  # half a byte a weight and its scales, and kernels
        assert engine.nbytes < ROWS * COLUMNS * (0.5 + 1 / BLOCK) + 500_000
