"""A recorded parity set: tokens with the logits that PyTorch gave, replayed on any engine where there is no PyTorch.

One safetensors file. Its metadata says what is fed and what must hold; its tensors are the tokens, of which every case feeds a
prefix, and what the reference gave at some positions. Logits are kept whole, over the full vocabulary and in float32, so that
a replay has the measures and limits of `galerne verify`; at other positions only the likeliest token is.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from galerne import schema
from galerne.errors import InputError
from galerne.files import atomic_file
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines.engine import Float32, Int64
from galerne.runtime.engines.select import CPU, PORTABLE
from galerne.runtime.measures import CaseResult, Limits, judge, largest_difference
from galerne.runtime.model import Model
from galerne.runtime.safetensors import SafetensorsHeader, entries_in_a_row, header_bytes
from galerne.runtime.steps import feed_steps

SCHEMA_VERSION = 1

_RECORD = "galerne_recording"  # its key in the metadata
_REMEDY = "record it again with `galerne verify --record`"
_TYPES = {"int64": "I64", "float32": "F32"}


@dataclass(frozen=True)
class RecordedCase:
    """One comparison.

    steps: the number of tokens of each run.
    positions: those at which logits are compared, ascending.
    greedy: those at which the engine's likeliest token must be the reference's, ascending; but where the reference's two
        likeliest are too close to tell.
    """

    name: str
    steps: tuple[int, ...]
    positions: tuple[int, ...]
    greedy: tuple[int, ...] = ()


@dataclass(frozen=True)
class RecordingFacts:
    """What a recording belongs to and what must hold.

    bundle: `Bundle.fingerprint` of the one it was made for.
    reference: what gave the logits.
    logits_std: the standard deviation of the recorded logits.
    limits: by engine: "cpu" for the engine of that name, "portable" for the graph itself and everything else.
    sha256: of this record with an empty `sha256`, and of the data.
    """

    schema_version: int
    galerne_version: str
    bundle: str
    reference: str
    logits_std: float
    limits: dict[str, Limits]
    cases: tuple[RecordedCase, ...]
    sha256: str = ""

    def limits_of(self, engine: str) -> Limits:
        """Return what holds for an engine."""
        return self.limits[CPU if engine == CPU else PORTABLE]


@dataclass(frozen=True)
class Recording:
    """A recorded parity set.

    tokens: [T] int64.
    positions: [K] int64, ascending. logits: the reference's there, [K, vocab_size] float32.
    greedy_positions: [G] int64, ascending. likeliest: the reference's likeliest token there, [G] int64. margins: how far its
        logit is above the next one's, [G] float32.
    """

    facts: RecordingFacts
    tokens: Int64
    positions: Int64
    logits: Float32
    greedy_positions: Int64
    likeliest: Int64
    margins: Float32

    def write(self, path: Path) -> None:
        """Write it to a file; the same recording gives the same bytes. Raises: InputError if that fails."""
        tensors = {name: np.ascontiguousarray(getattr(self, name), dtype) for name, dtype in _TENSORS.items()}
        facts = dataclasses.replace(self.facts, sha256=_digest(self.facts, tensors))
        entries = entries_in_a_row((name, _TYPES[array.dtype.name], array.shape) for name, array in tensors.items())
        try:
            with atomic_file(path) as file:
                file.write(header_bytes(entries, {_RECORD: schema.to_json(facts).decode()}))
                for array in tensors.values():
                    file.write(array.tobytes())
        except OSError as exc:
            raise InputError(f"{path}: cannot write the recording there ({exc.strerror})") from exc

    @staticmethod
    def read(path: Path) -> "Recording":
        """Read a recording. Raises: InputError if it is none, or was changed."""
        header = SafetensorsHeader(path)
        text = header.metadata.get(_RECORD)
        if not isinstance(text, str):
            raise InputError(f"{path}: no {_RECORD} in its metadata, so it is no recorded parity set")
        facts = schema.read_json(RecordingFacts, text.encode(), str(path), SCHEMA_VERSION, _REMEDY)
        tensors: dict[str, npt.NDArray[Any]] = {}
        for name, dtype in _TENSORS.items():
            entry = header.entries.get(name)
            if entry is None or entry.dtype != _TYPES[dtype]:
                found = "none" if entry is None else f"one of {entry.dtype}"
                raise InputError(f"{path}: {name}: expected a tensor of {_TYPES[dtype]}, found {found}; {_REMEDY}")
            tensors[name] = header.view(name, dtype)
        if _digest(facts, tensors) != facts.sha256:
            raise InputError(f"{path}: its SHA-256 is not the one it was written with: the file was changed; {_REMEDY}")
        return Recording(facts, **tensors)


_TENSORS = {
    "tokens": "int64",
    "positions": "int64",
    "logits": "float32",
    "greedy_positions": "int64",
    "likeliest": "int64",
    "margins": "float32",
}


@dataclass(frozen=True)
class Replay:
    """The verdict of a replay, and what it rests on; the fields are those of the report of `galerne verify`."""

    passed: bool
    engine: str
    reference: str
    logits_std: float
    tolerances: Limits
    cases: tuple[CaseResult, ...]


def replay(
    recording: Recording, bundle: Bundle, engine: str = PORTABLE, advance: Callable[[], None] = lambda: None
) -> Replay:
    """Feed an engine what the reference was fed, and compare. Needs no PyTorch and nothing of the checkpoint.

    Args:
        engine: "portable", or the name of one in the bundle.
        advance: called after each case.
    Raises: InputError if the recording was made for another bundle; BackendError if the engine cannot run here.
    """
    found = bundle.fingerprint()
    if recording.facts.bundle != found:
        raise InputError(
            f"{bundle.path}: its fingerprint is {found[:12]}…, the recording was made for {recording.facts.bundle[:12]}…; "
            "give the recording that was made for this bundle"
        )
    limits = recording.facts.limits_of(engine)
    results = []
    # As `galerne verify` runs it: the portable graph in its exact mode, an engine as it ships.
    with Model.open(bundle.path, engine, exact=engine == PORTABLE) as model:
        for case in recording.facts.cases:
            results.append(_replay_case(recording, case, model, limits))
            advance()
    return Replay(
        passed=all(result.passed for result in results),
        engine=engine,
        reference=recording.facts.reference,
        logits_std=recording.facts.logits_std,
        tolerances=limits,
        cases=tuple(results),
    )


def _replay_case(recording: Recording, case: RecordedCase, model: Model, limits: Limits) -> CaseResult:
    compared, greedy = np.array(case.positions, np.int64), np.array(case.greedy, np.int64)
    kept, total = np.union1d(compared, greedy), sum(case.steps)
    rows = model.rows()
    (logits,) = feed_steps(rows, [recording.tokens], [(count,) for count in case.steps], [kept])
    rows.close()
    reference = recording.logits[np.searchsorted(recording.positions, compared)]
    candidate = logits[np.searchsorted(kept, compared)]
    result = judge(case.name, total, reference, candidate, largest_difference(reference, candidate), limits)
    places = np.searchsorted(recording.greedy_positions, greedy)
    # Both tokens' logits may be off by max_abs.
    clear = recording.margins[places] > 2 * limits.max_abs
    wanted, got = recording.likeliest[places], logits[np.searchsorted(kept, greedy)].argmax(axis=1)
    wrong = np.flatnonzero(clear & (wanted != got))
    if not len(wrong):
        return result
    first = wrong[0]
    failure = (
        f"{len(wrong)} of {clear.sum()} greedy tokens differ, the first after position {greedy[first]}: {got[first]}, the "
        f"reference's is {wanted[first]}"
    )
    return dataclasses.replace(result, passed=False, failures=(*result.failures, failure))


def _digest(facts: RecordingFacts, tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256(schema.to_json(dataclasses.replace(facts, sha256="")))
    for name, array in tensors.items():
        digest.update(name.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
