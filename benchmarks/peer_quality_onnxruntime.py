"""ONNX Runtime's own quantizer on Galerne's float32 graph: `python -m benchmarks.peer_quality_onnxruntime MODEL METHOD`.

All methods take the weights in blocks of 128, or of 64 where 128 does not divide the input axis, and the vocabulary projection in
int8, as Galerne's recipes do. The embedding table stays float32, and so do the scales.
"""

import argparse
import contextlib
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from benchmarks.graph_feeds import feeds

onnxruntime.set_default_logger_severity(3)  # it warns of every cache that is not updated in place
quantizer = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
METHODS = ("nearest, asymmetric", "nearest, symmetric", "HQQ", "GPTQ")
_HEAD = "/lm_head/MatMul"
_BLOCKS = (128, 64, 32)
_GPTQ_SEQUENCES = 4  # it runs the whole graph over all of them for each product
Int64 = NDArray[np.int64]


def quantized(path: Path, method: str, calibration: Int64) -> tuple[onnx.ModelProto, float]:
    """Return the graph as ONNX Runtime quantizes it, and the bits of a weight of the layers' products, scales included.

    Args:
        calibration: ids [sequences, length], for GPTQ.
    """
    blocks = _products(path)
    weights = sum(rows * columns for _, rows, columns, _ in blocks)
    if method == "GPTQ":
        config = quantizer.GPTQWeightOnlyQuantConfig(_Reader(path, calibration[:_GPTQ_SEQUENCES]))
        forms = {name: {"group_size": block} for name, *_, block in blocks}
        # It cannot leave a product out, so it rounds the vocabulary projection to eight bits itself, kept as floats.
        config.customized_weight_config = forms | {_HEAD: {"bits": 8, "group_size": _BLOCKS[0]}}
        # Symmetric, since with zero points it fails on an odd number of blocks.
        model = _process(onnx.load(path), None, is_symmetric=True, algo_config=config)
    else:
        model = onnx.load(path)
        for size in sorted({block for *_, block in blocks}):
            if method == "HQQ":
                options: dict[str, Any] = {"algo_config": quantizer.HQQWeightOnlyQuantConfig(block_size=size)}
            else:
                options = {"is_symmetric": method == "nearest, symmetric"}
            model = _process(model, {name for name, *_, block in blocks if block == size}, block_size=size, **options)
    model = _process(model, {_HEAD}, block_size=_BLOCKS[0], bits=8, is_symmetric=True)
    return model, 8 * _product_bytes(model) / weights


def _process(model: Any, names: set[str] | None, **options: Any) -> onnx.ModelProto:
    """Quantize the products of these names, or all that there are."""
    exclude = []
    if names is not None:
        exclude = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in names]
    made = quantizer.MatMulNBitsQuantizer(model, nodes_to_exclude=exclude, **options)
    made.process()
    result: onnx.ModelProto = made.model.model
    return result


def _products(path: Path) -> list[tuple[str, int, int, int]]:
    """Return the name, [in, out] and the block of each product of the layers."""
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.name != _HEAD and node.input[1] in shapes:
            rows, columns = shapes[node.input[1]]
            found.append((node.name, rows, columns, next(size for size in _BLOCKS if rows % size == 0)))
    return found


def _product_bytes(model: onnx.ModelProto) -> int:
    """Return the bytes of all that the layers' quantized products read: values, scales, zero points."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {
        name
        for node in model.graph.node
        if node.op_type == "MatMulNBits" and "lm_head" not in node.name
        for name in node.input[1:]
    }
    return sum(onnx.numpy_helper.to_array(tensors[name]).nbytes for name in names if name in tensors)


class _Reader:
    """The calibration ids as GPTQ's calibration asks for them: the feeds of one sequence at a time."""

    def __init__(self, path: Path, ids: Int64) -> None:
        self._path, self._ids = path, ids

    def __iter__(self) -> Any:
        inputs = onnxruntime.InferenceSession(str(self._path)).get_inputs()
        return (feeds(inputs, row) for row in self._ids)


def main() -> None:
    """Quantize, write the logits, and print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="model.onnx of a float32 bundle")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder for the quantized model")
    parser.add_argument("--logits", type=argparse.FileType("wb"), required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # GPTQ prints a bar there
        model, bits = quantized(args.model, args.method, np.load(args.calibration))
    seconds = time.perf_counter() - start
    path, data = args.scratch / "model.onnx", args.scratch / "model.data"
    onnx.save(model, path, save_as_external_data=True, location=data.name)
    del model
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(str(path), options)
    for row in np.load(args.ids):
        (found,) = session.run(["logits"], feeds(session.get_inputs(), row))
        args.logits.write(found.tobytes())
    size = path.stat().st_size + data.stat().st_size
    print(json.dumps({"size_bytes": size, "product_bits": bits, "seconds": seconds}))


if __name__ == "__main__":
    main()
