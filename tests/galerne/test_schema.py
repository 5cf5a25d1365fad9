"""The strict reader: what it takes, and that each refusal names the field, the value and what was expected."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galerne import schema
from galerne.errors import InputError


@dataclass(frozen=True)
class Inner:
    size: int
    note: str | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["int8", "int4"]
    ratio: float = 0.5
    on: bool = False
    block: int | None = None
    limit: int | str = 0
    ids: tuple[int, ...] = ()
    names: list[str] = field(default_factory=list)
    inner: Inner | None = None
    table: dict[str, Inner] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)


LEAST = {"name": "a", "kind": "int8"}


def test_defaults_fill_what_is_absent() -> None:
    assert schema.read(Outer, LEAST, "f") == Outer("a", "int8")


def test_everything_at_once() -> None:
    data = {
        **LEAST,
        "ratio": 2,
        "on": True,
        "block": 128,
        "limit": "none",
        "ids": [1, 2],
        "names": ["x"],
        "inner": {"size": 1, "note": "n"},
        "table": {"k": {"size": 2}},
        "free": {"any": [None, {"deep": 1.5}]},
    }
    read = schema.read(Outer, data, "f")
    assert read.ratio == 2.0
    assert isinstance(read.ratio, float)
    assert read.ids == (1, 2)
    assert read.inner == Inner(1, "n")
    assert read.table == {"k": Inner(2)}
    assert (read.on, read.block, read.limit, read.names) == (True, 128, "none", ["x"])
    assert read.free == {"any": [None, {"deep": 1.5}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "b"}, "f: unknown key 'nmae'; allowed: name, kind, ratio"),
        ({"name": 1}, "f: name: expected a string, found 1"),
        ({"name": None}, "f: name: expected a string, found None"),
        ({"kind": "fp4"}, "f: kind: expected one of int8, int4, found 'fp4'"),
        ({"kind": ["int8"]}, "f: kind: expected one of int8, int4, found ['int8']"),
        ({"ratio": "1"}, "f: ratio: expected a number, found '1'"),
        ({"ratio": True}, "f: ratio: expected a number, found True"),
        ({"on": 1}, "f: on: expected true or false, found 1"),
        ({"block": True}, "f: block: expected an integer, found True"),
        ({"block": 1.0}, "f: block: expected an integer, found 1.0"),
        ({"limit": 1.5}, "f: limit: expected an integer or a string, found 1.5"),
        ({"ids": [1, "2"]}, "f: ids[1]: expected an integer, found '2'"),
        ({"ids": 1}, "f: ids: expected a list of an integer, found 1"),
        ({"names": "x"}, "f: names: expected a list of a string, found 'x'"),
        ({"inner": []}, "f: inner: expected a table, found []"),
        ({"inner": {}}, "f: inner: missing key 'size'"),
        ({"table": {"k": {"size": "2"}}}, "f: table.k: size: expected an integer, found '2'"),
        ({"table": 3}, "f: table: expected a table, found 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusal_says_where_and_what(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        schema.read(Outer, {**LEAST, **change}, "f")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("key", LEAST)
def test_missing_key(key: str) -> None:
    with pytest.raises(InputError, match=f"^f: missing key '{key}'$"):
        schema.read(Outer, {k: v for k, v in LEAST.items() if k != key}, "f")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_a_number_is_finite(value: float) -> None:
    with pytest.raises(InputError, match="^f: ratio: expected a finite number"):
        schema.read(Outer, {**LEAST, "ratio": value}, "f")


def test_literal_tells_true_from_one() -> None:
    @dataclass(frozen=True)
    class Choice:
        version: Literal[1, 2]

    assert schema.read(Choice, {"version": 1}, "f") == Choice(1)
    with pytest.raises(InputError, match="found True"):
        schema.read(Choice, {"version": True}, "f")


def test_a_later_field_is_written_only_where_it_says_something() -> None:
    @dataclass(frozen=True)
    class Grown:
        name: str
        extra: dict[str, int] = field(default_factory=dict, metadata=schema.LATER)

    assert json.loads(schema.to_json(Grown(""))) == {"name": ""}
    assert json.loads(schema.to_json(Grown("", {"a": 1}))) == {"name": "", "extra": {"a": 1}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(JSON | st.dictionaries(st.sampled_from([*Outer.__dataclass_fields__, "other"]), JSON))
def test_whatever_comes_gives_a_record_or_an_input_error(data: object) -> None:
    try:
        read = schema.read(Outer, data, "f")
    except InputError as exc:
        assert str(exc).startswith("f: ")
    else:
        assert isinstance(read, Outer)
