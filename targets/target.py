"""What is known of a device that an engine can be built for: one TOML file under data/ each."""

import difflib
import re
from dataclasses import dataclass, field
from typing import Literal

from galerne.errors import InputError
from galerne.targets import operator_table, tables

Kind = Literal["cpu", "datacenter", "workstation", "jetson"]
Backend = Literal["onnxruntime", "onnxruntime_cuda", "tensorrt_rtx", "tensorrt"]
NumberType = Literal["float32", "float16", "bfloat16", "int8", "int4", "fp8", "fp4"]
Dialect = Literal["opset24", "primitive"]

_DATA = "galerne.targets.data"
# Figures that need a source, where a file has them.
_FIGURES = (
    "compute_capability",
    "memory_bytes",
    "reserved_bytes",
    "bandwidth_bytes_per_s",
    "dense_ops_per_s",
    "power_modes",
)


@dataclass(frozen=True)
class Stack:
    """Software that builds and runs engines on a device.

    name: such as "jetpack-6.2"; unique within the file.
    version: of the backend, as far as it counts, such as "10.3"; null where any will do.
    types: number types of weights and activations that the backend takes on this device.
    operators: the table under operators/ that says what its parser reads; null where there is none.
    dialect: the newest dialect of the graph that it reads.
    builds_on: "any" where an engine can be built on another machine without this device's GPU, "gpu" where on any machine
        with a GPU of the same kind, "device" where only on the box itself.
    cuda, python: versions that come with it; null where it fixes none.
    source: where this comes from, one line each.
    """

    name: str
    backend: Backend
    types: tuple[NumberType, ...]
    dialect: Dialect
    builds_on: Literal["any", "gpu", "device"]
    source: tuple[str, ...]
    version: str | None = None
    operators: str | None = None
    cuda: str | None = None
    python: str | None = None

    @property
    def is_tensorrt(self) -> bool:
        """Whether it is TensorRT or TensorRT-RTX."""
        return self.backend in ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class PowerMode:
    """A power mode of a box.

    number: what `nvpmodel -m` takes. watts: null where it has no budget of its own.
    bandwidth_bytes_per_s: where it differs from the device's.
    """

    name: str
    number: int
    watts: int | None = None
    bandwidth_bytes_per_s: int | None = None


@dataclass(frozen=True)
class Target:
    """One device and the software that runs engines on it.

    name: as in `--target`; also the file's stem.
    title: the vendor's name of it.
    stacks: the first is the default.
    sources: for each figure's key where it comes from.
    compute_capability: such as "8.9"; null on a CPU.
    memory_bytes: what is built in, the data sheet's gigabytes of 2^30 bytes. Null on a CPU: the machine's own memory counts.
    reserved_bytes: what the system, the driver and a CUDA context take of that before an engine is loaded.
    unified_memory: whether CPU and GPU share the memory.
    bandwidth_bytes_per_s: peak of the memory, from the data sheet. Null on a CPU, where it is measured on the spot.
    dense_ops_per_s: peak without sparsity by type, a multiplication and an addition counted as two, in the strongest power mode.
    power_modes: of a box that has them, the strongest first.
    """

    name: str
    title: str
    kind: Kind
    stacks: tuple[Stack, ...]
    sources: dict[str, str] = field(default_factory=dict)
    compute_capability: str | None = None
    memory_bytes: int | None = None
    reserved_bytes: int | None = None
    unified_memory: bool = False
    bandwidth_bytes_per_s: int | None = None
    dense_ops_per_s: dict[str, int] = field(default_factory=dict)
    power_modes: tuple[PowerMode, ...] = ()

    @property
    def usable_bytes(self) -> int | None:
        """What is left of the memory for engines; null on a CPU."""
        return None if self.memory_bytes is None else self.memory_bytes - (self.reserved_bytes or 0)

    def stack(self, name: str | None = None) -> Stack:
        """Return a stack by its name, by default the first.

        Raises: InputError if there is none of that name.
        """
        if name is None:
            return self.stacks[0]
        for stack in self.stacks:
            if stack.name == name:
                return stack
        there = ", ".join(stack.name for stack in self.stacks)
        raise InputError(f"--stack: {self.name} has no stack named {name!r}; there are: {there}")


def names() -> list[str]:
    """Return the names of all targets, sorted."""
    return tables.names(_DATA)


def load(name: str) -> Target:
    """Read a target by its name.

    Raises: InputError if there is none of that name, or its file breaks a rule.
    """
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name.lower().replace("_", "-").replace(" ", "-"), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"--target: no target named {name!r}; {hint}there are: {', '.join(known)}")
    return parse(tables.text(_DATA, name), name)


def load_all() -> list[Target]:
    """Read all targets, sorted by name."""
    return [load(name) for name in names()]


def parse(text: str, name: str) -> Target:
    """Read a target file's text; `name` is the file's stem.

    Raises: InputError naming the file and the field.
    """
    where = f"targets/data/{name}.toml"
    target = tables.parse(Target, text, name, where, ("title", "stacks"))
    for key in ("compute_capability", "memory_bytes", "bandwidth_bytes_per_s"):
        value = getattr(target, key)
        if (value is None) != (target.kind == "cpu"):
            expected = "nothing, since a CPU's is measured on the spot" if target.kind == "cpu" else "a value"
            raise InputError(f"{where}: {key}: expected {expected}, found {value!r}")
    for key in ("memory_bytes", "reserved_bytes", "bandwidth_bytes_per_s"):
        value = getattr(target, key)
        if value is not None and value <= 0:
            raise InputError(f"{where}: {key}: expected a positive number, found {value}")
    capability = target.compute_capability
    if capability is not None and not re.fullmatch(r"[0-9]+\.[0-9]", capability):
        raise InputError(f'{where}: compute_capability: expected a form like "8.9", found {capability!r}')
    _check_sources(target, where)
    _check_stacks(target, where)
    return target


def _check_sources(target: Target, where: str) -> None:
    for key in _FIGURES:
        if getattr(target, key) and not target.sources.get(key):
            raise InputError(f"{where}: sources: expected where {key} comes from, found nothing")
    for key in target.sources:
        if key not in _FIGURES:
            raise InputError(f"{where}: sources: {key!r} is no figure; allowed: {', '.join(_FIGURES)}")


def _check_stacks(target: Target, where: str) -> None:
    names: set[str] = set()
    for i, stack in enumerate(target.stacks):
        at = f"{where}: stacks[{i}]"
        for key in ("types", "source"):
            if not getattr(stack, key):
                raise InputError(f"{at}: {key}: expected at least one, found none")
        if (stack.backend == "onnxruntime") != (target.kind == "cpu"):
            raise InputError(f"{at}: backend: expected onnxruntime on a CPU and there only, found {stack.backend!r}")
        if stack.operators is not None and stack.operators not in operator_table.names():
            there = ", ".join(operator_table.names())
            raise InputError(f"{at}: operators: expected one of {there}, found {stack.operators!r}")
        if stack.name in names:
            raise InputError(f"{at}: name: expected one of its own, found {stack.name!r} again")
        names.add(stack.name)
