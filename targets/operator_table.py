"""Which ONNX operators and types an engine builder's parser reads: one TOML file under operators/ each."""

from collections.abc import Iterable
from dataclasses import dataclass
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
    refused_attributes: attributes that a node must not state, not even with their default.
    note: what else is asked of a node, for people.
    """

    types: tuple[ElementType, ...]
    opset: int | None = None
    constant_inputs: tuple[int, ...] = ()
    refused_attributes: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class OperatorTable:
    """What a parser reads.

    name: the file's stem. title: for people. source: where it comes from, one line each.
    min_opset, max_opset: of a graph, both included.
    operators: by their ONNX name; what is not listed is refused.
    """

    name: str
    title: str
    min_opset: int
    max_opset: int
    source: tuple[str, ...]
    operators: dict[str, Operator]


@dataclass(frozen=True)
class Use:
    """One node of a graph, as far as a table speaks of it.

    types: of its data, as `Operator.types` has it.
    since: the opset that gave its operator the form, apart from its types, that the graph's opset reads.
    inputs: how many it has. constant_inputs: the positions of those that are constants.
    attributes: the names of those that it states.
    """

    node: str
    operator: str
    types: tuple[str, ...]
    since: int
    inputs: int
    constant_inputs: tuple[int, ...]
    attributes: tuple[str, ...]


def names() -> list[str]:
    """Return the names of all tables, sorted."""
    return tables.names(_DATA)


def load(name: str) -> OperatorTable:
    """Read a table by its name.

    Raises: InputError if there is none of that name, or its file breaks a rule.
    """
    if name not in names():
        raise InputError(f"no operator table named {name!r}; there are: {', '.join(names())}")
    return parse(tables.text(_DATA, name), name)


def parse(text: str, name: str) -> OperatorTable:
    """Read a table's text; `name` is the file's stem.

    Raises: InputError naming the file and the field.
    """
    where = f"targets/operators/{name}.toml"
    table = tables.parse(OperatorTable, text, name, where, ("title", "source", "operators"))
    if not 1 <= table.min_opset <= table.max_opset:
        raise InputError(f"{where}: max_opset: expected at least min_opset {table.min_opset}, found {table.max_opset}")
    for kind, operator in table.operators.items():
        if not operator.types:
            raise InputError(f"{where}: operators.{kind}: types: expected at least one, found none")
        if operator.opset is not None and operator.opset <= table.max_opset:
            raise InputError(
                f"{where}: operators.{kind}: opset: expected one above max_opset {table.max_opset}, found {operator.opset}"
            )
    return table


def refusals(table: OperatorTable, opset: int, uses: Iterable[Use]) -> list[str]:
    """Return a line for each way in which a graph of an opset goes beyond a table, none if it is within.

    An opset above the table's is no refusal in itself: what counts is whether it changed the operators that are used.
    """
    lines: list[str] = []
    if opset < table.min_opset:
        lines.append(f"the graph is of opset {opset}, expected at least {table.min_opset}")
    for use in uses:
        operator = table.operators.get(use.operator)
        if operator is None:
            lines.append(f"{use.node}: {use.operator} is not among its operators")
            continue
        newest = operator.opset or table.max_opset
        if use.since > newest:
            lines.append(f"{use.node}: {use.operator} in the form of opset {use.since}, expected at most {newest}")
        lines += [
            f"{use.node}: {use.operator} of {kind}, expected {', '.join(operator.types)}"
            for kind in use.types
            if kind not in operator.types
        ]
        lines += [
            f"{use.node}: {use.operator}: input {position} is computed, expected a constant"
            for position in operator.constant_inputs
            if position < use.inputs and position not in use.constant_inputs
        ]
        lines += [
            f"{use.node}: {use.operator}: attribute {name}, expected none"
            for name in operator.refused_attributes
            if name in use.attributes
        ]
    return lines
