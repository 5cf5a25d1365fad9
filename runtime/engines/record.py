"""What `engines/NAME/engine.json` holds: how an engine was built, and from which bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from galerne import schema
from galerne.errors import InputError
from galerne.runtime.bundle import ENGINES, GRAPH, MANIFEST, Bundle

SCHEMA_VERSION = 1
RECORD = "engine.json"

_REMEDY = "build the engine again with this version of Galerne and --force"

Parity = Literal["passed", "failed", "none"]
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]
Weights = Literal["inside", "streamed", "stripped"]


@dataclass(frozen=True)
class Profile:
    """The shapes that one profile of an engine takes: [min, opt, max] of the batch B, the new tokens S and the logits K.

    name: "decode" for one token, "prefill" for up to a chunk, "draft" for a token and the draft behind it, with logits for each.
    """

    name: str
    batch: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: tuple[int, ...] = (1, 1, 1)


@dataclass(frozen=True)
class EngineRecord:
    """The whole of `engine.json`.

    target: the name it was built for, which is also the engine's name in the bundle.
    backend_version: of the builder; an engine is only sure to load in the same one.
    file: the engine's main file, in the record's own folder.
    compute_capability: such as "8.9"; null for a CPU engine.
    cpu_features: sorted CPU flags that the engine counts on; null for a GPU engine.
    profiles: empty where every shape of the contract is taken.
    inputs: hex SHA-256 of each file of the bundle that it was built from, by its path in the bundle.
    options: what the builder was told.
    parity: the bundle's "portable" verdict when the engine was built.
    stack: the name of the target's software stack that it was built for.
    hardware_compatibility: which other GPUs TensorRT was told to make it run on.
    version_compatible: whether TensorRT was told to make it load in later versions of the same major version.
    weights: "inside" the engine; "streamed" from host memory under a budget; or "stripped", to be refitted from the
        bundle's `weights.bin` by the names of `network.onnx`, which then lies in the record's own folder.
    platform: operating system and architecture that it runs on, such as "linux-aarch64"; null where it runs on any.
    cuda: the version of CUDA that the driver must support, such as "12.6" or "13"; null where it is not known.
    timing_cache: the file in the record's own folder with what TensorRT measured; null where it measures nothing.
    """

    schema_version: int
    target: str
    backend: str
    backend_version: str
    file: str
    compute_capability: str | None
    cpu_features: tuple[str, ...] | None
    profiles: tuple[Profile, ...]
    inputs: dict[str, str]
    parity: Parity
    options: dict[str, Any] = field(default_factory=dict)
    stack: str = ""
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    weights: Weights = "inside"
    platform: str | None = None
    cuda: str | None = None
    timing_cache: str | None = None

    def to_json(self) -> bytes:
        """Return the record as UTF-8 JSON; the same record gives the same bytes."""
        return schema.to_json(self)


def parse(data: bytes, where: str) -> EngineRecord:
    """Read a record.

    Raises: InputError if it is no JSON, of another schema version, or a field is missing, unknown or of the wrong form.
    """
    record = schema.read_json(
        EngineRecord, data, where, SCHEMA_VERSION, "build the engine again with this version of Galerne and --force"
    )
    check_profiles(record.profiles, where)
    return record


def check_profiles(profiles: Sequence[Profile], where: str) -> None:
    """Check that each size is [min, opt, max]. Raises: InputError naming the field."""
    for i, profile in enumerate(profiles):
        for name, sizes in (("batch", profile.batch), ("tokens", profile.tokens), ("logits", profile.logits)):
            if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise InputError(
                    f"{where}: profiles[{i}]: {name}: expected [min, opt, max], rising from 1 or more, "
                    f"found {list(sizes)}"
                )


def inputs_of(bundle: Bundle, names: tuple[str, ...]) -> dict[str, str]:
    """Return the manifest's hex SHA-256 of the files that an engine is built from.

    Raises: InputError if one is not listed.
    """
    for name in names:
        if name not in bundle.manifest.files:
            raise InputError(f"{bundle.path / MANIFEST}: files: {name!r} is not listed; export the bundle again")
    return {name: bundle.manifest.files[name].sha256 for name in names}


def parity_of(bundle: Bundle) -> Parity:
    """Return the bundle's "portable" verdict in the record's words."""
    verdict = bundle.manifest.parity.get("portable")
    if verdict is None:
        return "none"
    return "passed" if verdict.passed else "failed"


def load_record(bundle: Bundle, name: str) -> EngineRecord:
    """Read the record of one of the bundle's engines and check that it belongs to the bundle as it is now.

    Raises: InputError if there is no such engine, its record is broken, or it was built from other bytes.
    """
    built = bundle.engines()
    if name not in built:
        there = f"there are: {', '.join(built)}" if built else "it has none"
        raise InputError(
            f"{bundle.path}: no engine named {name!r} in it ({there}); "
            f"build it with `galerne build {bundle.path} --target {name}`"
        )
    rebuild = f"rebuild it with `galerne build {bundle.path} --target {name} --force`"
    folder = f"{ENGINES}/{name}"
    path = _listed(bundle, f"{folder}/{RECORD}", rebuild)
    record = parse(path.read_bytes(), str(path))
    _listed(bundle, f"{folder}/{record.file}", rebuild)
    if GRAPH not in record.inputs:
        raise InputError(f"{path}: inputs: expected {GRAPH!r} among them, found {sorted(record.inputs)}; {rebuild}")
    for file, sha256 in record.inputs.items():
        entry = bundle.manifest.files.get(file)
        if entry is None or entry.sha256 != sha256:
            now = f"{entry.sha256[:12]}…" if entry else "not in it"
            raise InputError(f"{path}: inputs: built from {file} {sha256[:12]}…, but the bundle's is {now}; {rebuild}")
    return record


def _listed(bundle: Bundle, name: str, rebuild: str) -> Path:
    if name not in bundle.manifest.files:
        raise InputError(f"{bundle.path / MANIFEST}: files: {name!r} is not listed; {rebuild}")
    return bundle.file(name)
