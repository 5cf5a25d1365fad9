"""The tables of operators load, a bad one names its field, and each way to go beyond a table is told in a line."""

import dataclasses
import itertools

import pytest

from galerne.errors import InputError
from galerne.targets.operator_table import Input, OperatorTable, Use, departures, load, names, parse

GOOD = """
name = "parser"
title = "A parser"
min_opset = 9
max_opset = 20
source = ["its manual"]

[operators]
Add = { types = ["float32", "float16"] }
DequantizeLinear = { types = ["int8", "int4"], opset = 21, zero_inputs = [2] }
ReduceMean = { types = ["float32"], constant_inputs = [1] }
ScatterND = { types = ["float32"], refused_attributes = ["reduction"] }

[operators.Attention]
types = ["float32", "float16"]
opset = 24
absent_inputs = [4]
input_types = { 3 = ["bool"] }
input_ranks = { 0 = 4 }
max_outputs = 1
attribute_values = { is_causal = [0] }
"""
# On the table of TensorRT 10.3, which has an Add for float32, float16, bfloat16, int32 and int64.
DERIVED = """
name = "derived"
title = "A later parser"
base = "tensorrt-10.3"
removed = ["Abs"]
min_opset = 9
max_opset = 24
source = ["its manual"]

[operators]
Add = { types = ["float32"] }
Swish = { types = ["float16"] }
"""
COMPUTED = Input("float32", 2)
AXES = Input("int64", 1, constant=True)
ADD = Use("/add", "Add", ("float16",), since=14, inputs=(COMPUTED, COMPUTED), outputs=1, attributes={})
DEQUANTIZE = Use(
    "/dq", "DequantizeLinear", ("int4",), 21, (Input("int4", 2, constant=True), COMPUTED), 1, {"block_size": 32}
)
MEAN = Use("/mean", "ReduceMean", ("float32",), 18, (COMPUTED, AXES), 1, {"keepdims": 1})
SCATTER = Use("/scatter", "ScatterND", ("float32",), 18, (COMPUTED, AXES, COMPUTED), 1, {})


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


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('base = "tensorrt-10.3"', 'base = "none"', "no operator table named 'none'"),
        ('base = "tensorrt-10.3"', 'base = "derived"', "base: expected a table that does not start from this one"),
        (
            'removed = ["Abs"]',
            'removed = ["Swish"]',
            "removed: expected an operator of tensorrt-10.3 .*, found 'Swish'",
        ),
        ('removed = ["Abs"]', 'removed = ["Add"]', "removed: expected an operator .* that is not stated, found 'Add'"),
        (
            'types = ["float32"]',
            'types = ["float32", "float16", "bfloat16", "int32", "int64"]',
            "operators.Add: expected another entry than tensorrt-10.3 has, found the same",
        ),
        ('base = "tensorrt-10.3"', "", "removed: without a base, expected none"),
    ],
)
def test_a_bad_derived_table_names_its_field(old: str, new: str, message: str) -> None:
    assert old in DERIVED
    with pytest.raises(InputError, match=message):
        parse(DERIVED.replace(old, new), "derived")


def test_a_derived_table_has_the_operators_of_its_base() -> None:
    base, derived = load("tensorrt-10.3"), parse(DERIVED, "derived")
    assert set(derived.operators) == set(base.operators) - {"Abs"} | {"Swish"}
    assert derived.operators["Add"].types == ("float32",)
    assert derived.operators["Concat"] == base.operators["Concat"]


def test_a_table_without_operators_needs_a_base() -> None:
    lines = GOOD[: GOOD.index("[operators]")] + "[operators]\n"
    with pytest.raises(InputError, match="operators: without a base, expected some"):
        parse(lines, "parser")


def test_later_tensorrts_read_what_the_earlier_ones_do_and_more() -> None:
    chain = [load(f"tensorrt-{version}") for version in ("10.3", "10.13", "10.16", "11.0")]
    for earlier, later in itertools.pairwise(chain):
        assert set(earlier.operators) < set(later.operators)
        assert earlier.max_opset < later.max_opset
    newer = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
    assert newer == set(chain[2].operators) - set(chain[1].operators)
    assert "fp4" in chain[1].operators["DequantizeLinear"].types
    assert chain[2].operators["Attention"].absent_inputs == (4, 5, 6)


def lines(table: OperatorTable, opset: int, uses: list[Use]) -> list[str]:
    return [str(departure) for departure in departures(table, opset, uses)]


def attention(**changes: object) -> Use:
    inputs = (Input("float16", 4), Input("float16", 4), Input("float16", 4), Input("bool", 4))
    fine = Use("/att", "Attention", ("float16",), 24, inputs, 1, {"scale": 0.5, "is_causal": 0})
    return dataclasses.replace(fine, **changes)  # type: ignore[arg-type]


def test_what_is_within_a_table_is_not_refused() -> None:
    plain = dataclasses.replace(MEAN, node="/mean_1", inputs=(COMPUTED,))
    unknown = attention(inputs=(Input(None), None, None, Input(None)))
    assert departures(parse(GOOD, "parser"), 21, [ADD, DEQUANTIZE, MEAN, plain, SCATTER, attention(), unknown]) == []


@pytest.mark.parametrize(
    ("use", "line"),
    [
        (dataclasses.replace(ADD, operator="Loop"), "/add: Loop: found Loop, expected one of A parser's operators"),
        (dataclasses.replace(ADD, types=("int64",)), "/add: Add: found int64, expected float32 or float16"),
        (dataclasses.replace(ADD, since=24), "/add: Add: found its form of opset 24, expected at most 20"),
        (
            dataclasses.replace(DEQUANTIZE, since=23),
            "/dq: DequantizeLinear: found its form of opset 23, expected at most 21",
        ),
        (
            dataclasses.replace(DEQUANTIZE, inputs=(*DEQUANTIZE.inputs, Input("int4", 2, constant=True))),
            "/dq: DequantizeLinear: found input 2 other than zero, expected zeros",
        ),
        (
            dataclasses.replace(MEAN, inputs=(COMPUTED, COMPUTED)),
            "/mean: ReduceMean: found input 1 computed, expected a constant",
        ),
        (
            dataclasses.replace(SCATTER, attributes={"reduction": "none"}),
            "/scatter: ScatterND: found attribute reduction, expected none",
        ),
        (attention(outputs=2), "/att: Attention: found 2 outputs, expected at most 1"),
        (attention(attributes={"is_causal": 1}), "/att: Attention: found attribute is_causal = 1, expected 0"),
        (
            attention(inputs=(*attention().inputs, Input("float16", 4))),
            "/att: Attention: found input 4, expected none",
        ),
        (
            attention(inputs=(*attention().inputs[:3], Input("float32", 4))),
            "/att: Attention: found input 3 of float32, expected bool",
        ),
        (
            attention(inputs=(Input("float16", 3), *attention().inputs[1:])),
            "/att: Attention: found input 0 of 3 axes, expected 4",
        ),
    ],
)
def test_what_is_beyond_a_table_is_told(use: Use, line: str) -> None:
    assert lines(parse(GOOD, "parser"), 20, [ADD, use]) == [line]


def test_zeros_are_a_fine_zero_point() -> None:
    zeros = Input("int4", 2, constant=True, zero=True)
    use = dataclasses.replace(DEQUANTIZE, inputs=(*DEQUANTIZE.inputs, zeros))
    assert departures(parse(GOOD, "parser"), 20, [use]) == []


def test_an_opset_older_than_the_table_is_told() -> None:
    assert lines(parse(GOOD, "parser"), 8, []) == ["the graph: found opset 8, expected at least 9"]
