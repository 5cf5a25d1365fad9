"""Constants that lowerings add to a graph."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def constant(graph: ir.Graph, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> ir.Value:
    """Return the graph's initializer of a name, made with a value where there is none yet."""
    if name not in graph.initializers:
        array: npt.NDArray[Any] = np.asarray(value, dtype)
        kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=kind))
    return graph.initializers[name]
