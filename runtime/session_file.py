"""A session on disk: a safetensors file of its keys, values and last logits, with what they belong to in its metadata.

The header is an 8-byte length and a JSON object, the data follows. Source: the safetensors format's description. Reading
derives the header that the file must have and compares, so nothing in a file decides about sizes or offsets.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from galerne import __version__, schema
from galerne.errors import InputError
from galerne.files import atomic_file
from galerne.runtime.adapter import Adapter, fingerprint
from galerne.runtime.manifest import cache_names, layer_kinds
from galerne.runtime.ring import Ring
from galerne.runtime.rows import Float32, Rows
from galerne.runtime.safetensors import entries_in_a_row, header_bytes

if TYPE_CHECKING:
    from galerne.runtime.model import Model

SCHEMA_VERSION = 1

_RECORD = "galerne_session"  # its key in the metadata, whose values are text
_MOST_HEADER_BYTES = 1 << 24
# NumPy lacks bfloat16: an engine that keeps it gives its bits.
_TYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8"}
_REMEDY = "feed the text again"


@dataclass(frozen=True)
class SessionRecord:
    """What a saved session belongs to and where it stood.

    bundle: `fingerprint` of the bundle, and the adapter, that wrote it.
    engine: the engine's name, for information.
    position, written, capacities: as in `Ring`.
    sha256: of this record with an empty `sha256`, and of the data.
    """

    schema_version: int
    galerne_version: str
    bundle: str
    engine: str
    position: int
    written: int
    capacities: tuple[int, ...]
    has_logits: bool
    sha256: str


def write_session(path: Path, rows: Rows, logits: Float32 | None) -> None:
    """Write rows of one sequence; the file is there whole or not at all. Raises: InputError if it cannot be written."""
    # An engine may keep its rings in another order; the file has the contract's.
    ring, arrays = rows.ring, _tensors([np.ascontiguousarray(array) for array in rows.cache.arrays()], logits)
    record = SessionRecord(
        schema_version=SCHEMA_VERSION,
        galerne_version=__version__,
        bundle=fingerprint(rows.model.bundle, rows.adapter),
        engine=rows.model.engine.name,
        position=int(ring.positions[0]),
        written=int(ring.written[0]),
        capacities=ring.capacities,
        has_logits=logits is not None,
        sha256="",
    )
    digest = _digest(record)
    for array in arrays.values():
        digest.update(_bytes(array))
    record = dataclasses.replace(record, sha256=digest.hexdigest())
    try:
        with atomic_file(path) as file:
            file.write(header_bytes(_layout(arrays), {_RECORD: schema.to_json(record).decode()}))
            for array in arrays.values():
                file.write(_bytes(array))
    except OSError as exc:
        raise InputError(f"{path}: cannot write the session there ({exc.strerror})") from exc


def read_session(model: "Model", path: Path, adapter: Adapter | None = None) -> tuple[Rows, Float32 | None]:
    """Read a saved session into new rows. Returns: the rows, and the logits [vocab_size] after the last token, if known.

    Raises: InputError if the file is no session, damaged, or of another bundle, adapter or type of cache than the model's.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _read(model, path, adapter, file, size)
    except OSError as exc:
        raise InputError(f"{path}: cannot read a session there ({exc.strerror})") from exc


def _read(
    model: "Model", path: Path, adapter: Adapter | None, file: BufferedReader, size: int
) -> tuple[Rows, Float32 | None]:
    header, start = _header(path, file, size)
    metadata = header.pop("__metadata__", None)
    text = metadata.get(_RECORD) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{path}: no {_RECORD} in its metadata, so it is no session of Galerne's")
    record = schema.read_json(SessionRecord, text.encode(), str(path), SCHEMA_VERSION, _REMEDY)
    expected_by = fingerprint(model.bundle, adapter)
    if record.bundle != expected_by:
        what = "model" if not model.graph.adapter_slots else "model or adapter"
        against = model.bundle.path if adapter is None else f"{model.bundle.path} with {adapter.path}"
        raise InputError(
            f"{path}: saved with another {what} ({record.bundle[:12]}…) than {against} ({expected_by[:12]}…); {_REMEDY}"
        )
    ring = _ring(model, path, record)
    logits = np.zeros(model.facts.vocab_size, np.float32) if record.has_logits else None
    # Read into arrays of our own and not into the cache's, which may lie on another device, or be larger.
    arrays = _tensors(_empty(model, record), logits)
    expected = _layout(arrays)
    if header != expected:
        found, wanted = _cache_type(header), _cache_type(expected)
        if found != wanted:
            raise InputError(
                f"{path}: holds {found} keys, engine {model.engine.name!r} keeps {wanted}; it was saved with engine "
                f"{record.engine!r}"
            )
        raise InputError(f"{path}: its tensors are not those of a session of {record.position} tokens: {_REMEDY}")
    data_bytes = sum(array.nbytes for array in arrays.values())
    if size - start != data_bytes:
        raise InputError(f"{path}: expected {data_bytes} bytes of data, found {size - start}: it was cut or changed")
    digest = _digest(record)
    for array in arrays.values():
        file.readinto(_bytes(array))
        digest.update(_bytes(array))
    if digest.hexdigest() != record.sha256:
        raise InputError(f"{path}: its SHA-256 is not the one it was saved with: the file was changed; {_REMEDY}")
    rows = model.rows_at(ring, adapter)
    rows.cache.fill([array for name, array in arrays.items() if name != "logits"])
    return rows, logits


def _empty(model: "Model", record: SessionRecord) -> list[npt.NDArray[Any]]:
    """Return arrays for the rings of a record, keys and values by turns."""
    facts = model.facts
    slots = [record.capacities[kind] for kind in layer_kinds(facts.layer_windows)[1] for _ in range(2)]
    return [np.empty((1, facts.num_key_value_heads, count, facts.head_dim), model.engine.ring_dtype) for count in slots]


def _header(path: Path, file: BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    """Return the header, and where the data begins."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
        raise InputError(f"{path}: not a session: expected a safetensors header, found {size} bytes of something else")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path}: not a session: its header is not JSON ({exc})") from exc
    if not isinstance(header, dict):
        raise InputError(f"{path}: not a session: its header is no JSON object")
    return header, 8 + length


def _ring(model: "Model", path: Path, record: SessionRecord) -> Ring:
    """Return the ring of a record. Raises: InputError if such a ring cannot be."""
    ring, full = Ring(model.graph, 1), model.graph.capacities
    fits = len(record.capacities) == len(full) and all(
        0 < now <= most and (now == most or record.written <= now)
        for now, most in zip(record.capacities, full, strict=True)
    )
    limit = model.graph.max_context
    if not fits or not 0 <= record.position <= record.written or (limit is not None and record.position > limit):
        raise InputError(
            f"{path}: {record.position} tokens in {' and '.join(map(str, record.capacities))} slots cannot be in a ring "
            f"of {' and '.join(map(str, full))}: the file was changed; {_REMEDY}"
        )
    ring.positions[0], ring.written[0], ring.capacities = record.position, record.written, record.capacities
    return ring


def _tensors(cache: Sequence[npt.NDArray[Any]], logits: Float32 | None) -> dict[str, npt.NDArray[Any]]:
    """Name the arrays of a session, in the order of the file."""
    tensors = dict(zip(cache_names("past_key_values", len(cache) // 2), cache, strict=True))
    return tensors if logits is None else {**tensors, "logits": logits}


def _layout(tensors: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Return the safetensors header of arrays that lie one after the other."""
    return entries_in_a_row((name, _TYPES[array.dtype.name], array.shape) for name, array in tensors.items())


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _cache_type(layout: dict[str, Any]) -> object:
    first = layout.get("past_key_values.0.key")
    return first.get("dtype") if isinstance(first, dict) else None


def _digest(record: SessionRecord) -> "hashlib._Hash":
    return hashlib.sha256(schema.to_json(dataclasses.replace(record, sha256="")))
