"""Which ONNX operators and types an engine builder's parser reads: one TOML file under operators/ each."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from galerne.errors import InputError
from galerne.targets import tables

ElementType = Literal[
    "float32", "float16", "bfloat16", "double", "int64", "int32", "int8", "int4", "uint8", "bool", "fp8", "fp4"
]

_DATA = "galerne.targets.operators"


@dataclass(frozen=True)
class Operator:
    """What is read of one operator.

    types: of its data: the first input, the values that Where chooses from, and what Cast gives.
    opset: the ONNX opset whose form of it is read, where that is newer than the table's `max_opset`.
    constant_inputs: positions of inputs that must be constants.
    absent_inputs: positions of inputs that a node must leave out.
    zero_inputs: positions of inputs that must be constants of zeros.
    input_types: for the position of an input the types that it may have.
    input_ranks: for the position of an input its number of axes.
    max_outputs: how many outputs may be used; null where all.
    refused_attributes: attributes that a node must not state, not even with their default.
    attribute_values: the values that an attribute may state.
    note: what else is asked of a node, for people.
    """

    types: tuple[ElementType, ...]
    opset: int | None = None
    constant_inputs: tuple[int, ...] = ()
    absent_inputs: tuple[int, ...] = ()
    zero_inputs: tuple[int, ...] = ()
    input_types: dict[str, tuple[ElementType, ...]] = field(default_factory=dict)
    input_ranks: dict[str, int] = field(default_factory=dict)
    max_outputs: int | None = None
    refused_attributes: tuple[str, ...] = ()
    attribute_values: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class OperatorTable:
    """What a parser reads.

    name: the file's stem. title: for people. source: where it comes from, one line each.
    min_opset, max_opset: of a graph, both included.
    base: the table that this one starts from; its operators hold here too unless they are stated anew.
    removed: operators of the base that this parser does not read.
    operators: by their ONNX name; what is not listed is refused.
    """

    name: str
    title: str
    min_opset: int
    max_opset: int
    source: tuple[str, ...]
    operators: dict[str, Operator]
    base: str | None = None
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Input:
    """One input of a node.

    type: null where nothing is known of it. rank: its number of axes; null where it is unknown.
    constant: whether its values are in the graph. zero: whether they are all zero.
    """

    type: str | None
    rank: int | None = None
    constant: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Use:
    """One node of a graph, as far as a table speaks of it.

    types: of its data, as `Operator.types` has it.
    since: the opset that gave its operator the form, apart from its types, that the graph's opset reads.
    inputs: by position; null where one is left out.
    outputs: how many of its outputs are named.
    attributes: those that it states, with their values.
    """

    node: str
    operator: str
    types: tuple[str, ...]
    since: int
    inputs: tuple[Input | None, ...]
    outputs: int
    attributes: dict[str, object]


@dataclass(frozen=True)
class Departure:
    """One way in which a graph goes beyond a table.

    node: null where it is the whole graph. kind: which field of the table it breaks, "missing" for an operator without one.
    """

    node: str | None
    operator: str | None
    kind: str
    found: str
    expected: str

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.node, self.operator) if part)
        return f"{where or 'the graph'}: found {self.found}, expected {self.expected}"


def names() -> list[str]:
    """Return the names of all tables, sorted."""
    return tables.names(_DATA)


def load(name: str) -> OperatorTable:
    """Read a table by its name, with what it takes over from its base.

    Raises: InputError if there is none of that name, or its file breaks a rule.
    """
    return _load(name, ())


def parse(text: str, name: str) -> OperatorTable:
    """Read a table's text, with what it takes over from its base; `name` is the file's stem.

    Raises: InputError naming the file and the field.
    """
    return _parse(text, name, (name,))


def _load(name: str, above: tuple[str, ...]) -> OperatorTable:
    if name not in names():
        raise InputError(f"no operator table named {name!r}; there are: {', '.join(names())}")
    return _parse(tables.text(_DATA, name), name, (*above, name))


def _parse(text: str, name: str, above: tuple[str, ...]) -> OperatorTable:
    where = f"targets/operators/{name}.toml"
    table = tables.parse(OperatorTable, text, name, where, ("title", "source"))
    if not 1 <= table.min_opset <= table.max_opset:
        raise InputError(f"{where}: max_opset: expected at least min_opset {table.min_opset}, found {table.max_opset}")
    for kind, operator in table.operators.items():
        if not operator.types:
            raise InputError(f"{where}: operators.{kind}: types: expected at least one, found none")
        if operator.opset is not None and operator.opset <= table.max_opset:
            raise InputError(
                f"{where}: operators.{kind}: opset: expected one above max_opset {table.max_opset}, found {operator.opset}"
            )
        for key in (*operator.input_types, *operator.input_ranks):
            if not key.isdecimal():
                raise InputError(f"{where}: operators.{kind}: expected an input's position as a key, found {key!r}")
    if table.base is not None:
        return _with_base(table, where, above)
    if table.removed or not table.operators:
        field_name, found = ("removed", table.removed) if table.removed else ("operators", {})
        raise InputError(
            f"{where}: {field_name}: without a base, expected {'none' if found else 'some'}, found {found}"
        )
    return table


def _with_base(table: OperatorTable, where: str, above: tuple[str, ...]) -> OperatorTable:
    assert table.base is not None
    if table.base in above:
        raise InputError(f"{where}: base: expected a table that does not start from this one, found {table.base!r}")
    base = _load(table.base, above).operators
    for kind in table.removed:
        if kind not in base or kind in table.operators:
            raise InputError(
                f"{where}: removed: expected an operator of {table.base} that is not stated, found {kind!r}"
            )
    for kind, operator in table.operators.items():
        if base.get(kind) == operator:
            raise InputError(f"{where}: operators.{kind}: expected another entry than {table.base} has, found the same")
    kept = {kind: operator for kind, operator in base.items() if kind not in table.removed}
    return dataclasses.replace(table, operators=dict(sorted((kept | table.operators).items())))


def departures(table: OperatorTable, opset: int, uses: Iterable[Use]) -> list[Departure]:
    """Return each way in which a graph of an opset goes beyond a table, none if it is within.

    An opset above the table's is none in itself: what counts is whether it changed the operators that are used.
    """
    found: list[Departure] = []
    if opset < table.min_opset:
        found.append(Departure(None, None, "opset", f"opset {opset}", f"at least {table.min_opset}"))
    for use in uses:
        operator = table.operators.get(use.operator)
        if operator is None:
            found.append(
                Departure(use.node, use.operator, "missing", use.operator, f"one of {table.title}'s operators")
            )
        else:
            found += _of_node(use, operator, operator.opset or table.max_opset)
    return found


def _of_node(use: Use, operator: Operator, newest: int) -> Iterator[Departure]:
    def departure(kind: str, found: str, expected: str) -> Departure:
        return Departure(use.node, use.operator, kind, found, expected)

    if use.since > newest:
        yield departure("opset", f"its form of opset {use.since}", f"at most {newest}")
    for kind in use.types:
        if kind not in operator.types:
            yield departure("types", kind, " or ".join(operator.types))
    for position, given in enumerate(use.inputs):
        if given is not None:
            yield from (departure(*wrong) for wrong in _of_input(position, given, operator))
    if operator.max_outputs is not None and use.outputs > operator.max_outputs:
        yield departure("max_outputs", f"{use.outputs} outputs", f"at most {operator.max_outputs}")
    for name, value in use.attributes.items():
        if name in operator.refused_attributes:
            yield departure("refused_attributes", f"attribute {name}", "none")
        allowed = operator.attribute_values.get(name)
        if allowed is not None and value not in allowed:
            yield departure("attribute_values", f"attribute {name} = {value}", " or ".join(map(str, allowed)))


def _of_input(position: int, given: Input, operator: Operator) -> Iterator[tuple[str, str, str]]:
    name = f"input {position}"
    if position in operator.absent_inputs:
        yield "absent_inputs", name, "none"
    if position in operator.constant_inputs and not given.constant:
        yield "constant_inputs", f"{name} computed", "a constant"
    if position in operator.zero_inputs and not given.zero:
        yield "zero_inputs", f"{name} other than zero", "zeros"
    types = operator.input_types.get(str(position))
    if types is not None and given.type is not None and given.type not in types:
        yield "input_types", f"{name} of {given.type}", " or ".join(types)
    rank = operator.input_ranks.get(str(position))
    if rank is not None and given.rank is not None and given.rank != rank:
        yield "input_ranks", f"{name} of {given.rank} axes", f"{rank}"
