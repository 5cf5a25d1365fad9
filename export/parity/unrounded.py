"""Takes the rounding of inputs, keys and values out of a bundle's graph, and holds what it was against the checkpoint.

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
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.composed import rounded_cache, rounded_inputs
from galerne.optimize.quantize.qdq import VALUES_SUFFIX
from galerne.runtime.bundle import GRAPH, MANIFEST, WEIGHTS, Bundle, entry_of
from galerne.runtime.measures import CaseResult

_NUMBERS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_KINDS: dict[int, str] = {TensorProto.INT8: "int", TensorProto.FLOAT8E4M3FN: "float"}
_CASE = "rounding, as the graph has it and the checkpoint"
# How many differences are told.
_SHOWN = 3

Rounding = dict[str, tuple[str, float]]


@contextmanager
def unrounded(bundle: Bundle) -> Iterator[Bundle]:
    """Yield the bundle with products and attention reading their inputs as they are; it is gone afterwards."""
    model = onnx.load(str(bundle.file(GRAPH)), load_external_data=False)
    _take_out_of_cache(model.graph, bundle.manifest.graph.compute_type)
    _take_out(model.graph)
    with tempfile.TemporaryDirectory(dir=bundle.path, prefix=".verify-") as folder:
        plain = Path(folder)
        (plain / GRAPH).write_bytes(model.SerializeToString())
        os.link(bundle.file(WEIGHTS), plain / WEIGHTS)  # no symbolic link: ONNX Runtime follows none out of its folder
        files = {GRAPH: entry_of(plain / GRAPH), WEIGHTS: bundle.manifest.files[WEIGHTS]}
        facts = dataclasses.replace(bundle.manifest.graph, rounded_cache=None)
        manifest = dataclasses.replace(bundle.manifest, graph=facts, files=files)
        (plain / MANIFEST).write_bytes(manifest.to_json())
        yield Bundle(plain, manifest)


def compare_rounding(bundle: Bundle, checkpoint: Checkpoint) -> CaseResult:
    """Compare what each product's input, and each ring, is rounded to in the graph with what the checkpoint says of it."""
    inputs, cache = rounded_inputs(checkpoint), rounded_cache(checkpoint)
    graph = onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph
    found, wanted = _by_layer(graph_rounding(graph), inputs) | cache_rounding(graph), inputs | cache
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
        found[_weight_name(product, made)] = _how(quantize, dequantize, constants)
    return found


def cache_rounding(graph: GraphProto) -> Rounding:
    """Return what each ring is rounded to: as `graph_rounding`, by names as in "model.layers.0.self_attn.k"."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    return {
        f"model.layers.{number}.self_attn.{part[0]}": _how(quantize, dequantize, constants)
        for _, number, part, quantize, dequantize, _ in _rounded_rings(graph)
    }


def _how(quantize: NodeProto, dequantize: NodeProto, constants: Mapping[str, TensorProto]) -> tuple[str, float]:
    zero = constants[quantize.input[2]]
    scale = float(numpy_helper.to_array(constants[quantize.input[1]]).astype(np.float32))
    if list(quantize.input[1:]) != list(dequantize.input[1:]) or numpy_helper.to_array(zero).astype(np.float32) != 0:
        scale = float("nan")
    return _KINDS.get(zero.data_type, "other"), scale


def _rounded_rings(graph: GraphProto) -> Iterator[tuple[str, str, str, NodeProto, NodeProto, NodeProto]]:
    """Yield of each ring that is rounded its output, layer, "key" or "value", what rounds it, what reads it, what writes it."""
    made = {output: node for node in graph.node for output in node.output}
    readers = {name: node for node in graph.node for name in node.input if node.op_type == "DequantizeLinear"}
    for output in graph.output:
        _, _, place = output.name.partition("present.")
        if not place:
            continue
        update = made[output.name]
        quantize = next((made[name] for name in update.input if _is_quantize(made.get(name))), None)
        if quantize is not None:
            layer, part = place.split(".")
            yield output.name, layer, part, quantize, readers[output.name], update


def _is_quantize(node: NodeProto | None) -> bool:
    return node is not None and node.op_type == "QuantizeLinear"


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
    _drop_unread(graph)


def _take_out_of_cache(graph: GraphProto, compute_type: str) -> None:
    """Let the rings hold keys and values in the type that the graph computes in, as they are before the rounding."""
    number = _NUMBERS[compute_type]
    values = {value.name: value for value in (*graph.input, *graph.output)}
    for name, layer, part, quantize, dequantize, update in list(_rounded_rings(graph)):
        narrow = helper.make_node("Cast", [quantize.input[0]], [f"{name}/unrounded"], to=number)
        graph.node.insert(list(graph.node).index(quantize), narrow)
        update.input[list(update.input).index(quantize.output[0])] = narrow.output[0]
        wide = helper.make_node("Cast", [name], [f"{name}/wide"], to=TensorProto.FLOAT)
        graph.node.insert(list(graph.node).index(dequantize), wide)
        for node in graph.node:
            for i, read in enumerate(node.input):
                if read == dequantize.output[0]:
                    node.input[i] = wide.output[0]
        for ring in (f"past_key_values.{layer}.{part}", name):
            values[ring].type.tensor_type.elem_type = number
    _drop_unread(graph)


def _drop_unread(graph: GraphProto) -> None:
    """Remove the rounding that nothing reads any more."""
    outputs = {output.name for output in graph.output}
    read = {name for node in graph.node for name in node.input} | outputs
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        for node in [node for node in graph.node if node.op_type == kind and node.output[0] not in read]:
            graph.node.remove(node)
            read = {name for left in graph.node for name in left.input} | outputs


def _by_layer(rounding: Rounding, known: Collection[str]) -> Rounding:
    """Give each layer of a fused product the product's rounding: qkv_proj is q_proj, k_proj and v_proj where it is no layer."""
    layers = {}
    for weight, how in rounding.items():
        name = weight.removesuffix(".weight")
        prefix, _, module = name.rpartition(".")
        kind = module.removesuffix("_proj")
        parts = list(kind) if re.fullmatch("[qkv]+", kind) else kind.split("_")
        ending = "" if prefix.rpartition(".")[0].endswith(".experts") else "_proj"  # a mixture's are w1, w2, w3
        apart = [f"{prefix}.{part}{ending}" for part in parts]
        layers.update(dict.fromkeys([name] if name in known or not module.endswith("_proj") else apart, how))
    return layers


def _say(rounding: Rounding, layer: str) -> str:
    kind, scale = rounding.get(layer, ("none", 0.0))
    return "no rounding" if kind == "none" else f"{kind} of 8 bits with the scale {scale:.6g}"
