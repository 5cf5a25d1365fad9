"""What is known of a device that an engine can be built for: one TOML file under data/ each."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from galerne.errors import InputError
from galerne.targets import tables

Kind = Literal["cpu", "datacenter", "workstation", "jetson"]
Backend = Literal["onnxruntime", "tensorrt_rtx", "tensorrt"]
NumberType = Literal["float32", "float16", "bfloat16", "int8", "int4", "fp8", "fp4"]

_DATA = "galerne.targets.data"


@dataclass(frozen=True)
class Target:
    """One device and the software that runs engines on it.

    name: as in `--target`; also the file's stem.
    title: the vendor's name of it.
    source: where the figures come from, one line each.
    types: number types of weights and activations that the backend builds for it.
    compute_capability: such as "8.9"; null on a CPU.
    memory_bytes: the data sheet's figure, its GB read as 10^9 bytes. The chips hold 7 % more; error correction and the
        driver take about that much. Null on a CPU: the machine's own memory counts.
    bandwidth_bytes_per_s: peak of the memory, from the data sheet. Null on a CPU, where it is measured on the spot.
    """

    name: str
    title: str
    kind: Kind
    backend: Backend
    types: tuple[NumberType, ...]
    source: tuple[str, ...]
    compute_capability: str | None = None
    memory_bytes: int | None = None
    bandwidth_bytes_per_s: int | None = None


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
    target = tables.parse(Target, text, name, where, ("title", "types", "source"))
    for field in ("compute_capability", "memory_bytes", "bandwidth_bytes_per_s"):
        value = getattr(target, field)
        if (value is None) != (target.kind == "cpu"):
            expected = "nothing, since a CPU's is measured on the spot" if target.kind == "cpu" else "a value"
            raise InputError(f"{where}: {field}: expected {expected}, found {value!r}")
        if isinstance(value, int) and value <= 0:
            raise InputError(f"{where}: {field}: expected a positive number, found {value}")
    capability = target.compute_capability
    if capability is not None and not re.fullmatch(r"[0-9]+\.[0-9]", capability):
        raise InputError(f'{where}: compute_capability: expected a form like "8.9", found {capability!r}')
    if (target.backend == "onnxruntime") != (target.kind == "cpu"):
        raise InputError(f"{where}: backend: expected onnxruntime on a CPU and there only, found {target.backend!r}")
    return target
