"""Takes the rounding of inputs out of a bundle's graph, and holds what it was against the checkpoint.

Two programs that round the same values differ by more than their own error: a value near the middle of two steps goes either
way, and the layers after it pass that on, until they are as far apart as rounding itself puts them. So no tight limit holds for
logits with rounded inputs. But the rounding can be read from the graph and compared exactly, and the rest can be held to the
limits of its arithmetic once it is taken out.
"""

import dataclasses
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.composed import rounded_inputs
from galerne.optimize.quantize.qdq import VALUES_SUFFIX
from galerne.runtime.bundle import GRAPH, MANIFEST, WEIGHTS, Bundle, entry_of
from galerne.runtime.measures import CaseResult

_KINDS = {TensorProto.INT8: "int", TensorProto.FLOAT8E4M3FN: "float"}
_CASE = "rounding of inputs, as the graph has it and the checkpoint"
# How many differences are told.
_SHOWN = 3

Rounding = dict[str, tuple[str, float]]


@contextmanager
def unrounded(bundle: Bundle) -> Iterator[Bundle]:
    """Yield the bundle with its products reading their inputs as they are; it is gone afterwards."""
    model = onnx.load(str(bundle.file(GRAPH)), load_external_data=False)
    _take_out(model.graph)
    with tempfile.TemporaryDirectory(dir=bundle.path, prefix=".verify-") as folder:
        plain = Path(folder)
        (plain / GRAPH).write_bytes(model.SerializeToString())
        os.link(bundle.file(WEIGHTS), plain / WEIGHTS)  # no symbolic link: ONNX Runtime follows none out of its folder
        files = {GRAPH: entry_of(plain / GRAPH), WEIGHTS: bundle.manifest.files[WEIGHTS]}
        manifest = dataclasses.replace(bundle.manifest, files=files)
        (plain / MANIFEST).write_bytes(manifest.to_json())
        yield Bundle(plain, manifest)


def compare_rounding(bundle: Bundle, checkpoint: Checkpoint) -> CaseResult:
    """Compare what each product's input is rounded to in the graph with what the checkpoint says of the product's layers."""
    wanted = rounded_inputs(checkpoint)
    found = _by_layer(graph_rounding(onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph), wanted)
    layers = sorted(found.keys() | wanted.keys())
    wrong = [layer for layer in layers if found.get(layer) != wanted.get(layer)]
    failures = [f"{layer}: expected {_say(wanted, layer)}, found {_say(found, layer)}" for layer in wrong[:_SHOWN]]
    if len(wrong) > _SHOWN:
        failures.append(f"{len(wrong) - _SHOWN} more")
    return CaseResult(_CASE, 0, None, None, 1 - len(wrong) / max(1, len(layers)), not wrong, tuple(failures))


def graph_rounding(graph: GraphProto) -> Rounding:
    """Return what the input of each product is rounded to, by its weight's name: "int" or "float" and the scale.

    QuantizeLinear and DequantizeLinear that do not undo each other, or that have a zero point, give the scale NaN.
    """
    made = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for product in graph.node:
        pair = _pair(product, made)
        if pair is None:
            continue
        quantize, dequantize = pair
        zero = constants[quantize.input[2]]
        scale = float(numpy_helper.to_array(constants[quantize.input[1]]).astype(np.float32))
        if (
            list(quantize.input[1:]) != list(dequantize.input[1:])
            or numpy_helper.to_array(zero).astype(np.float32) != 0
        ):
            scale = float("nan")
        found[_weight_name(product, made)] = _KINDS.get(zero.data_type, "other"), scale
    return found


def _pair(product: NodeProto, made: Mapping[str, NodeProto]) -> tuple[NodeProto, NodeProto] | None:
    """Return the QuantizeLinear and the DequantizeLinear that a product reads its input through."""
    dequantize = made.get(product.input[0]) if product.op_type == "MatMul" else None
    quantize = made.get(dequantize.input[0]) if dequantize is not None and dequantize.input else None
    if dequantize is None or quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    return quantize, dequantize


def _weight_name(product: NodeProto, made: Mapping[str, NodeProto]) -> str:
    name = product.input[1]
    while name in made:  # through DequantizeLinear and a Cast
        name = made[name].input[0]
    return str(name).removesuffix(VALUES_SUFFIX)


def _take_out(graph: GraphProto) -> None:
    made = {output: node for node in graph.node for output in node.output}
    for product in graph.node:
        if pair := _pair(product, made):
            product.input[0] = pair[0].input[0]
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        for node in [node for node in graph.node if node.op_type == kind and node.output[0] not in read]:
            graph.node.remove(node)
            read = {name for left in graph.node for name in left.input}


def _by_layer(rounding: Rounding, known: Collection[str]) -> Rounding:
    """Give each layer of a fused product the product's rounding: qkv_proj is q_proj, k_proj and v_proj where it is no layer."""
    layers = {}
    for weight, how in rounding.items():
        name = weight.removesuffix(".weight")
        prefix, _, module = name.rpartition(".")
        kind = module.removesuffix("_proj")
        parts = list(kind) if re.fullmatch("[qkv]+", kind) else kind.split("_")
        apart = [f"{prefix}.{part}_proj" for part in parts]
        layers.update(dict.fromkeys([name] if name in known or not module.endswith("_proj") else apart, how))
    return layers


def _say(rounding: Rounding, layer: str) -> str:
    kind, scale = rounding.get(layer, ("none", 0.0))
    return "no rounding" if kind == "none" else f"{kind} of 8 bits with the scale {scale:.6g}"
