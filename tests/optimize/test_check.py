"""A graph held against the tables: both dialects on every stack, planted faults by name, and TensorRT-RTX's own parser."""

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from galerne.errors import InputError
from galerne.optimize.check import Refusal, check
from galerne.runtime.bundle import GRAPH, Bundle
from galerne.targets.target import Stack, Target, load, load_all

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8", "int4-rtn": "int4"}
NEWER = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
# One target for each set of types and each table that there is.
STACKS = list({(s.name, s.types): (target, s) for target in load_all() for s in target.stacks}.values())
Graphs = Callable[[str, str], Path]


@pytest.fixture
def graph_of(bundle_of: Callable[[str], Bundle], primitive_of: Callable[[str], Bundle]) -> Graphs:
    return lambda name, dialect: (bundle_of if dialect == "opset24" else primitive_of)(name).file(GRAPH)


def refused(refusals: Iterable[Refusal]) -> set[str | None]:
    return {refusal.operator for refusal in refusals}


@pytest.mark.parametrize(("target", "stack"), STACKS, ids=[f"{target.name}-{stack.name}" for target, stack in STACKS])
def test_both_dialects_on_every_stack(graph_of: Graphs, target: Target, stack: Stack) -> None:
    """A stack takes the dialect that its file names, older ones too, and of the types those that its file names."""
    for name, kind in PRECISIONS.items():
        for dialect in ("primitive", "opset24"):
            found = check(graph_of(name, dialect), target, stack)
            known = dialect == "primitive" or stack.dialect == "opset24"
            assert bool(found) == (not known or kind not in stack.types), (name, dialect, [r.line for r in found])
            if not known:
                assert refused(found) >= NEWER


def test_the_alternatives_of_an_old_parser_are_the_dialect_and_the_newer_stack(graph_of: Graphs) -> None:
    target = load("jetson-orin-nx-16gb")
    found = check(graph_of("fp16", "opset24"), target, target.stack("jetpack-6.2"))
    first = next(refusal for refusal in found if refusal.operator == "Attention")
    assert first.node is not None and first.node.startswith("/model/layers.0/self_attn")
    assert first.alternative == "export with --dialect primitive, or choose --stack jetpack-7.2"
    assert first.line == (
        f"{first.node}: Attention: found Attention, expected one of TensorRT 10.3's operators: {first.alternative}"
    )


def test_the_alternative_to_a_type_is_a_precision_that_fits_or_another_stack_or_device(graph_of: Graphs) -> None:
    target = load("t4")
    found = check(graph_of("int4-rtn", "opset24"), target, target.stack())
    assert refused(found) == {"DequantizeLinear"}
    assert (found[0].found, found[0].expected) == ("int4", "float16 or int8")
    assert found[0].alternative == "export with --precision int8 or fp16, or choose --stack onnxruntime-cuda"
    found = check(graph_of("bf16", "opset24"), target, target.stack())
    assert found[0].alternative.startswith("export with --precision int8 or fp16, or choose another target: a10, ")


def planted(graph: Path, folder: Path, node: onnx.NodeProto, *constants: onnx.TensorProto) -> Path:
    """Save the graph with one node more, which reads what it is told to and gives a new value."""
    model = onnx.load(str(graph), load_external_data=False)
    model.graph.node.append(node)
    model.graph.initializer.extend(constants)
    onnx.save(model, str(folder / "planted.onnx"))
    return folder / "planted.onnx"


def one(kind: str, inputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, ["planted"], name="/planted", **attributes)


ROWS = numpy_helper.from_array(np.ones((4, 4), np.float32), "rows")
SCALE = numpy_helper.from_array(np.ones(4, np.float32), "scale")
CODES = numpy_helper.from_array(np.ones((4, 4), np.int8), "codes")
THREES = numpy_helper.from_array(np.full(4, 3, np.int8), "threes")
FOURS = helper.make_tensor("fours", TensorProto.UINT4, [4, 4], [1] * 16)


@pytest.mark.parametrize(
    ("node", "constants", "found", "expected"),
    [
        (one("Det", ["rows"]), [ROWS], "Det", "one of TensorRT 10.16"),
        (one("Erf", ["position_ids"]), [], "int64", "float32 or float16 or bfloat16"),
        (one("DequantizeLinear", ["fours", "scale"]), [FOURS, SCALE], "uint4", "int8 or fp8 or fp4 or int4"),
        (one("DequantizeLinear", ["codes", "scale", "threes"]), [CODES, SCALE, THREES], "input 2 other", "zeros"),
        (one("DynamicQuantizeLinear", ["rows"]), [ROWS], "DynamicQuantizeLinear", "one of"),
        (
            one("ScatterND", ["position_ids", "position_ids", "write_indices"], reduction="add"),
            [],
            "attribute reduction = add",
            "none",
        ),
        (one("ReduceSum", ["rows", "write_indices"]), [ROWS], "input 1 computed", "a constant"),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else None,
)
def test_what_is_planted_is_named(
    graph_of: Graphs, tmp_path: Path, node: onnx.NodeProto, constants: list[onnx.TensorProto], found: str, expected: str
) -> None:
    if node.op_type == "DynamicQuantizeLinear":
        node.output.extend(["planted_scale", "planted_zero"])
    path = planted(graph_of("fp16", "opset24"), tmp_path, node, *constants)
    target = load("h100-sxm")
    refusals = check(path, target, target.stack("tensorrt-10.16"))
    assert [(refusal.node, refusal.operator) for refusal in refusals] == [("/planted", node.op_type)]
    assert refusals[0].found.startswith(found)
    assert refusals[0].expected.startswith(expected)
    assert refusals[0].alternative


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda node: node.attribute.append(helper.make_attribute("is_causal", 1)), "attribute is_causal = 1"),
        (lambda node: node.attribute.append(helper.make_attribute("softcap", 30.0)), "attribute softcap = 30.0"),
        (lambda node: node.input.extend([*node.input[1:3]]), "input 4"),
        (lambda node: node.input.extend(["", "", "write_indices"]), "input 6"),
        (lambda node: node.output.extend(["more_keys", "more_values"]), "3 outputs"),
    ],
    ids=["is_causal", "softcap", "past_key", "nonpad_kv_seqlen", "outputs"],
)
def test_what_attention_must_not_have_is_named(
    graph_of: Graphs, tmp_path: Path, change: Callable[[onnx.NodeProto], None], found: str
) -> None:
    model = onnx.load(str(graph_of("fp16", "opset24")), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    change(node)
    onnx.save(model, str(tmp_path / "changed.onnx"))
    target = load("jetson-orin-nx-16gb")
    refusals = check(tmp_path / "changed.onnx", target, target.stack("jetpack-7.2"))
    assert {refusal.node for refusal in refusals} == {node.name}
    assert found in [refusal.found for refusal in refusals]
    assert refusals[0].alternative == "export with --dialect primitive"


def test_a_graph_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match="not a valid ONNX graph"):
        check(tmp_path / "model.onnx", load("cpu"), load("cpu").stack())


Values = dict[str, tuple[int, list[int]]]
H: int = TensorProto.FLOAT16
Q, K, MASK = [1, 4, 2, 64], [1, 4, 8, 64], [1, 1, 2, 8]
HALF: Values = {"q": (H, Q), "k": (H, K), "v": (H, K), "mask": (TensorProto.BOOL, MASK)}
X: Values = {"x": (H, [4, 4])}


def small(
    inputs: Values,
    kind: str,
    names: list[str],
    constants: Iterable[onnx.TensorProto] = (),
    gives: int = H,
    **attrs: Any,
) -> onnx.ModelProto:
    """Return a graph of one node; the shape of what it gives is left open."""
    graph = helper.make_graph(
        [helper.make_node(kind, names, ["y"], name="/node", **attrs)],
        "small",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_tensor_value_info("y", gives, None)],
        list(constants),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def ring(element: int = H, new: list[int] = Q, **attributes: Any) -> onnx.ModelProto:
    values: Values = {"past": (element, K), "new": (element, new), "at": (TensorProto.INT64, [1])}
    return small(values, "TensorScatter", list(values), gives=element, **attributes)


QKVM = ["q", "k", "v", "mask"]
TAKEN = {
    "attention": small(HALF, "Attention", QKVM),
    "a mask of two axes": small(HALF | {"mask": (TensorProto.BOOL, MASK[2:])}, "Attention", QKVM),
    "softcap of none": small(HALF, "Attention", QKVM, softcap=0.0),
    "a ring": ring(axis=2, mode="linear"),
    "int8 weights": small({}, "DequantizeLinear", ["codes", "scale"], [CODES, SCALE], gives=TensorProto.FLOAT),
    "no reduction": small(
        X | {"i": (TensorProto.INT64, [2, 1]), "u": (H, [2, 4])}, "ScatterND", ["x", "i", "u"], reduction="none"
    ),
    "Swish": small(X, "Swish", ["x"]),
}
NOT_TAKEN = {
    "softcap": small(HALF, "Attention", QKVM, softcap=30.0),
    "softmax_precision": small(HALF, "Attention", QKVM, softmax_precision=1),
    "past_key": small(HALF | {"pk": (H, K), "pv": (H, K)}, "Attention", ["q", "k", "v", "", "pk", "pv"]),
    "a causal mask beside another": small(HALF, "Attention", QKVM, is_causal=1),
    "a ring along the heads": ring(new=[1, 1, 8, 64], axis=1),
    "a circular ring": ring(axis=2, mode="circular"),
    "an int8 ring": ring(TensorProto.INT8, axis=2),
    "uint4 weights": small({}, "DequantizeLinear", ["fours", "scale"], [FOURS, SCALE], gives=TensorProto.FLOAT),
    "a zero point": small(
        {}, "DequantizeLinear", ["codes", "scale", "threes"], [CODES, SCALE, THREES], gives=TensorProto.FLOAT
    ),
    "reduction": small(
        X | {"i": (TensorProto.INT64, [2, 1]), "u": (H, [2, 4])}, "ScatterND", ["x", "i", "u"], reduction="add"
    ),
    "computed axes": small(X | {"axes": (TensorProto.INT64, [1])}, "ReduceMean", ["x", "axes"]),
    "Det": small({}, "Det", ["rows"], [ROWS], gives=TensorProto.FLOAT),
    "a softmax of integers": small({"i": (TensorProto.INT32, [4])}, "Softmax", ["i"], gives=TensorProto.INT32),
}
# The parser takes these and drops what they ask for, so the table refuses them.
DROPPED = {
    "nonpad_kv_seqlen": small(HALF | {"n": (TensorProto.INT64, [1])}, "Attention", ["q", "k", "v", "", "", "", "n"]),
    "a causal mask over a cache": small(HALF, "Attention", ["q", "k", "v"], is_causal=1),
}


def says(model: onnx.ModelProto, folder: Path) -> bool:
    onnx.save(model, str(folder / "small.onnx"))
    target = load("rtx-5090")
    return not check(folder / "small.onnx", target, target.stack("tensorrt-rtx-1.7"))


@pytest.mark.tensorrt
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize(
    ("model", "parses", "fine"),
    [
        *[pytest.param(model, True, True, id=name) for name, model in TAKEN.items()],
        *[pytest.param(model, False, False, id=name) for name, model in NOT_TAKEN.items()],
        *[pytest.param(model, True, False, id=name) for name, model in DROPPED.items()],
    ],
)
def test_the_table_of_tensorrt_rtx_agrees_with_its_parser(
    tmp_path: Path, model: onnx.ModelProto, parses: bool, fine: bool
) -> None:
    import tensorrt_rtx as trt

    from galerne.optimize.builders.tensorrt.hooks import log_of

    log = log_of(trt.ILogger)
    network = trt.Builder(log).create_network(0)
    assert trt.OnnxParser(network, log).parse(model.SerializeToString()) == parses
    assert says(model, tmp_path) == fine
