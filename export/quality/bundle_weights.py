"""A bundle's weights as its graph computes with them, dequantized, under the names of transformers' parameters."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from galerne.optimize.graph.weights import fused_name
from galerne.optimize.quantize.qdq import SCALE_SUFFIX, VALUES_SUFFIX, ZERO_POINT_SUFFIX
from galerne.runtime.bundle import GRAPH, Bundle

Float32 = npt.NDArray[np.float32]

# What reads one input: the graph keeps those that follow each other and are stored alike as one product.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class BundleWeights:
    """Reads one weight at a time; none is kept."""

    def __init__(self, bundle: Bundle) -> None:
        graph = onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph
        self._folder = str(bundle.path)
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        gathers = [node for node in graph.node if node.op_type == "Gather"]
        self._row_axes = {
            node.input[0]: next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            for node in gathers
        }
        self._products = {name for node in graph.node if node.op_type == "MatMul" for name in node.input[1:2]}

    def parameter(self, name: str, shapes: dict[str, tuple[int, ...]]) -> Tensor | None:
        """Return a parameter of transformers, float32; None if the graph has none of that name, as experts' and tied ones.

        Args:
            name: as in "model.layers.0.self_attn.k_proj.weight".
            shapes: of all parameters of the model, by name: says where a fused product is split.
        """
        if self._has(name):
            return self._shaped(name, shapes[name])
        prefix, _, kind = name.rpartition(".")
        prefix, _, module = prefix.rpartition(".")
        for parts in _runs_with(module):
            names = tuple(f"{prefix}.{part}.{kind}" for part in parts)
            if not self._has(fused := fused_name(names)):
                continue
            sizes = [shapes[part][0] for part in names]
            start = sum(sizes[: parts.index(module)])
            value = self._shaped(fused, (sum(sizes), *shapes[name][1:]))
            return value[start : start + shapes[name][0]].contiguous()
        return None

    def _has(self, name: str) -> bool:
        return name in self._tensors or name + VALUES_SUFFIX in self._tensors

    def _shaped(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a weight as transformers lays it out: [out, in]."""
        if name + VALUES_SUFFIX in self._tensors:
            rows_first = self._row_axes.get(name + VALUES_SUFFIX) == 0  # a table by itself
            value = self._quantized_table(name) if rows_first else self._dequantized(name).T
            return torch.from_numpy(np.ascontiguousarray(value))
        value = self._read(name)
        if len(shape) == 2 and name in self._products:
            value = np.ascontiguousarray(value.T)
        assert math.prod(value.shape) == math.prod(shape), (name, value.shape, shape)
        return torch.from_numpy(value.reshape(shape).copy())

    def _dequantized(self, name: str) -> Float32:
        values, scale = self._read(name + VALUES_SUFFIX), self._read(name + SCALE_SUFFIX)
        blocks = values.reshape(scale.shape[0] if scale.ndim == 2 else 1, -1, values.shape[1])
        if name + ZERO_POINT_SUFFIX in self._tensors:
            zero = self._read(name + ZERO_POINT_SUFFIX)
            blocks = blocks - zero.reshape(len(blocks), 1, -1)
        return (blocks * scale.reshape(len(blocks), 1, -1)).reshape(values.shape)

    def _quantized_table(self, name: str) -> Float32:
        return self._read(name + VALUES_SUFFIX) * self._read(name + SCALE_SUFFIX)[:, None]

    def _read(self, name: str) -> Float32:
        return numpy_helper.to_array(self._tensors[name], base_dir=self._folder).astype(np.float32)


def _runs_with(module: str) -> Iterator[tuple[str, ...]]:
    """Yield the runs of two or more modules that follow each other and read one input, and that a module is part of."""
    for parts in _TOGETHER:
        for first in range(len(parts)):
            for last in range(first + 2, len(parts) + 1):
                if module in parts[first:last]:
                    yield parts[first:last]
