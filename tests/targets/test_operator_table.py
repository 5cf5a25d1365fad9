"""The tables of operators load, a bad one names its field, and each way to go beyond a table is told in a line."""

import dataclasses

import pytest

from galerne.errors import InputError
from galerne.targets.operator_table import Use, load, names, parse, refusals

GOOD = """
name = "parser"
title = "A parser"
min_opset = 9
max_opset = 20
source = ["its manual"]

[operators]
Add = { types = ["float32", "float16"] }
DequantizeLinear = { types = ["int8", "int4"], opset = 21 }
ReduceMean = { types = ["float32"], constant_inputs = [1] }
ScatterND = { types = ["float32"], refused_attributes = ["reduction"] }
"""
ADD = Use("/add", "Add", ("float16",), since=14, inputs=2, constant_inputs=(), attributes=())


def test_every_table_loads_under_its_own_name() -> None:
    assert [load(name).name for name in names()] == names()
    assert "tensorrt-10.3" in names()


def test_tensorrt_10_3_lacks_what_later_ones_have() -> None:
    table = load("tensorrt-10.3")
    assert not {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"} & set(table.operators)
    assert {"MatMul", "Softmax", "ScatterND", "ReduceMean"} <= set(table.operators)
    assert "int4" in table.operators["DequantizeLinear"].types
    assert all("github.com/onnx/onnx-tensorrt" in line for line in table.source[:2])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"float16"', '"half"', r"parser.toml: operators.Add: types\[1\]: expected one of .*, found 'half'"),
        ('name = "parser"', 'name = "other"', "name: expected 'parser', the file's own name, found 'other'"),
        ("min_opset = 9", "min_opset = 21", "max_opset: expected at least min_opset 21, found 20"),
        ("opset = 21", "opset = 20", "operators.DequantizeLinear: opset: expected one above max_opset 20, found 20"),
        ('types = ["float32", "float16"]', "types = []", "operators.Add: types: expected at least one"),
        ('source = ["its manual"]', "source = []", "source: expected something"),
        ("[operators]", "[operator]", "unknown key 'operator'"),
        ("[operators]", "[operators", "not TOML"),
    ],
)
def test_a_bad_table_names_its_field(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError, match=message):
        parse(GOOD.replace(old, new), "parser")


def test_an_unknown_name_gets_the_list() -> None:
    with pytest.raises(InputError, match=r"no operator table named 'x'; there are: .*tensorrt-10\.3"):
        load("x")


def test_what_is_within_a_table_is_not_refused() -> None:
    used = [
        ADD,
        Use("/dq", "DequantizeLinear", ("int4",), 21, inputs=2, constant_inputs=(0, 1), attributes=("block_size",)),
        Use("/mean", "ReduceMean", ("float32",), 18, inputs=2, constant_inputs=(1,), attributes=("keepdims",)),
        Use("/mean_1", "ReduceMean", ("float32",), 18, inputs=1, constant_inputs=(), attributes=()),
        Use("/scatter", "ScatterND", ("float32",), 18, inputs=3, constant_inputs=(), attributes=()),
    ]
    assert refusals(parse(GOOD, "parser"), 21, used) == []


@pytest.mark.parametrize(
    ("use", "line"),
    [
        (dataclasses.replace(ADD, operator="Attention"), "/add: Attention is not among its operators"),
        (dataclasses.replace(ADD, types=("int64",)), "/add: Add of int64, expected float32, float16"),
        (dataclasses.replace(ADD, since=24), "/add: Add in the form of opset 24, expected at most 20"),
        (
            Use("/dq", "DequantizeLinear", ("int4",), 23, inputs=2, constant_inputs=(0, 1), attributes=()),
            "/dq: DequantizeLinear in the form of opset 23, expected at most 21",
        ),
        (
            Use("/mean", "ReduceMean", ("float32",), 18, inputs=2, constant_inputs=(), attributes=()),
            "/mean: ReduceMean: input 1 is computed, expected a constant",
        ),
        (
            Use("/scatter", "ScatterND", ("float32",), 18, inputs=3, constant_inputs=(), attributes=("reduction",)),
            "/scatter: ScatterND: attribute reduction, expected none",
        ),
    ],
)
def test_what_is_beyond_a_table_is_told(use: Use, line: str) -> None:
    assert refusals(parse(GOOD, "parser"), 20, [ADD, use]) == [line]


def test_an_opset_older_than_the_table_is_told() -> None:
    assert refusals(parse(GOOD, "parser"), 8, []) == ["the graph is of opset 8, expected at least 9"]
