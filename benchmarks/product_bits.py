"""How many bits a weight of a bundle's layers takes on average, read from its graph."""

import math

import onnx
from onnx import TensorProto

from galerne.optimize.quantize.qdq import SCALE_SUFFIX, VALUES_SUFFIX, ZERO_POINT_SUFFIX
from galerne.runtime.bundle import GRAPH, Bundle

_BITS = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
}


def product_bits(bundle: Bundle) -> float:
    """Return the bits of a weight of the layers' products: values, scales and zero points over the number of weights."""
    graph = onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph
    weights = bits = 0
    for tensor in graph.initializer:
        if not tensor.name.startswith("model.layers.") or ".weight" not in tensor.name:
            continue
        size, suffix = math.prod(tensor.dims), tensor.name.rpartition(".weight")[2]
        if suffix in (SCALE_SUFFIX, ZERO_POINT_SUFFIX):
            bits += size * _BITS[tensor.data_type]
        elif suffix == VALUES_SUFFIX or (suffix == "" and len(tensor.dims) == 2):
            weights += size
            bits += size * _BITS[tensor.data_type]
    return bits / weights
