"""Holds a graph against what a target's software is known to take, before anything is built."""

from dataclasses import dataclass
from pathlib import Path

from galerne.errors import InputError
from galerne.optimize.graph.uses import uses_of
from galerne.optimize.lower.table import words_for_bytes
from galerne.runtime.bundle import GRAPH, Bundle
from galerne.targets.operator_table import Departure, OperatorTable, Use, departures, load
from galerne.targets.target import Stack, Target, load_all

# What the newer dialect has of its own; the primitive one spells these out.
_NEWER = ("Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter")
# What reads a ring as it is: what writes into it, in one dialect and the other, and what asks for its size.
_OF_RINGS = ("TensorScatter", "ScatterND", "Shape")
_UNROUNDED_CACHE = "build it for --target cpu, or quantize with a recipe without `cache`"
# Operators that compute on the tensor cores, so that the device must have their type, as it must have that of quantized weights.
_PRODUCTS = ("MatMul", "Gemm", "Attention")
# What `galerne export --precision` asks of a device.
_PRECISIONS = {
    "int4": {"int4", "int8", "float16"},
    "int8": {"int8", "float16"},
    "fp16": {"float16"},
    "bf16": {"bfloat16"},
    "fp32": {"float32"},
}
_DEVICE, _SHOWN = "device", 4


@dataclass(frozen=True)
class Refusal:
    """One thing in a graph that a stack does not take.

    node, operator: null where it is the whole graph. alternative: what to do about it.
    """

    node: str | None
    operator: str | None
    found: str
    expected: str
    alternative: str

    @property
    def line(self) -> str:
        """All of it for a person."""
        return f"{Departure(self.node, self.operator, '', self.found, self.expected)}: {self.alternative}"


def check(graph: Path, target: Target, stack: Stack) -> list[Refusal]:
    """Return what a stack of a target does not take of a graph, none if it takes all.

    The graph is the portable one, with its embedding table lowered for TensorRT. What else that lowering adds, a Where for the
    mask and an attribute that lets attention be decomposed, every parser reads.

    Args:
        graph: of the ONNX file; its external data is not read.
        stack: one of the target's.
    Raises: InputError if it is no valid ONNX graph.
    """
    opset, uses = uses_of(graph, words_for_bytes if stack.operators is not None else None)
    by_node = {use.node: use for use in uses}
    parsers = _Parsers(opset)
    ways: dict[tuple[str | None, str, str], str] = {}  # layers repeat each other
    refusals = []
    for departure in parsers.departures(stack, uses):
        kind = departure.operator, departure.kind, departure.found
        if kind not in ways:
            ways[kind] = _alternative(departure, by_node.get(departure.node or ""), parsers, target, stack)
        refusals.append(Refusal(departure.node, departure.operator, departure.found, departure.expected, ways[kind]))
    return refusals


def check_graph(bundle: Bundle, target: Target, stack: Stack) -> None:
    """Raises: InputError if the bundle's graph has an operator or a type that the stack does not take."""
    refusals = check(bundle.file(GRAPH), target, stack)
    if refusals:
        more = f", and {len(refusals) - 1} more" if len(refusals) > 1 else ""
        raise InputError(
            f"{bundle.path}: {stack.name} of {target.name} does not take {refusals[0].line}{more}; "
            f"see `galerne check --target {target.name} --stack {stack.name}`"
        )


def check_cache(bundle: Bundle, target: Target, stack: Stack) -> None:
    """Raises: InputError if the bundle's rings are rounded and the stack is TensorRT, which takes rings of floats only."""
    rounded = bundle.manifest.graph.rounded_cache
    if rounded is not None and stack.is_tensorrt:
        raise InputError(
            f"{bundle.path}: {stack.name} of {target.name}, as all TensorRT, takes no ring of {rounded}: {_UNROUNDED_CACHE}"
        )


class _Parsers:
    """What stacks make of nodes of one opset; each table is read once."""

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._tables: dict[str, OperatorTable] = {}

    def departures(self, stack: Stack, uses: list[Use]) -> list[Departure]:
        """Return what a stack does not take, by its parser or its device."""
        found: list[Departure] = []
        if stack.operators is not None:
            if stack.operators not in self._tables:
                self._tables[stack.operators] = load(stack.operators)
            found += departures(self._tables[stack.operators], self._opset, uses)
        taken = {departure.node for departure in found}
        return found + [
            Departure(use.node, use.operator, _DEVICE, kind, " or ".join(stack.types))
            for use in uses
            if use.node not in taken
            for kind in _device_types(use)
            if kind not in stack.types
        ]


def _device_types(use: Use) -> list[str]:
    """Return the types that the device itself must have for a node."""
    if use.operator == "QuantizeLinear":  # what it gives is the type of its zero point
        return [given.type for given in use.inputs[2:3] if given is not None and given.type is not None]
    return list(use.types[:1]) if use.operator in _PRODUCTS or use.operator == "DequantizeLinear" else []


def _alternative(departure: Departure, use: Use | None, parsers: _Parsers, target: Target, stack: Stack) -> str:
    if use is not None and use.operator in _OF_RINGS and departure.found == "int8":
        return _UNROUNDED_CACHE
    ways = []
    # Its operators and their forms are older than any of these parsers.
    if departure.kind != _DEVICE and use is not None and (use.operator in _NEWER or departure.kind == "opset"):
        ways.append("export with --dialect primitive")
    if departure.kind == _DEVICE:
        fitting = [name for name, needed in _PRECISIONS.items() if needed <= set(stack.types)]
        ways.append(f"export with --precision {' or '.join(fitting)}")
        if departure.found == "fp8" and "int8" in stack.types:
            ways.append("quantize with --recipe int8-w8a8")
    if use is not None:
        others = [s.name for s in target.stacks if s != stack and not parsers.departures(s, [use])]
        if others:
            ways.append(f"choose --stack {' or '.join(others)}")
        elif departure.kind == _DEVICE:
            able = [
                t.name
                for t in load_all()
                if any(s.backend == stack.backend and departure.found in s.types for s in t.stacks)
            ]
            if able:
                ways.append(f"choose another target: {', '.join(able[:_SHOWN])}{', …' if len(able) > _SHOWN else ''}")
    return ", or ".join(ways) or "export it again: `galerne export` writes nothing of the kind"
