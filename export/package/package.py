"""Packs a bundle for a Jetson into one file, after checking here what can be checked before the box is touched."""

import dataclasses
import re
import tempfile
import zipfile
from importlib import resources
from pathlib import Path

from galerne.errors import CheckFailed, InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.package.archive import Member, check_name, write
from galerne.export.package.needs import disk_needs, memory_needs
from galerne.export.package.wheels import gather, lock_of, own_wheel
from galerne.export.parity.recorded import record
from galerne.optimize.builders.tensorrt.build_plan import NETWORK, PLAN
from galerne.optimize.builders.tensorrt.plan import plan
from galerne.progress import say, step
from galerne.runtime.bundle import ENGINES, MANIFEST, Bundle
from galerne.runtime.engines.record import parity_of
from galerne.runtime.engines.select import PORTABLE
from galerne.runtime.recorded import Recording, replay
from galerne.targets.target import Stack, Target

FORMAT = 1
SUMS = "SHA256SUMS"

_BOX = "galerne.export.package.box"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


@dataclasses.dataclass(frozen=True)
class Package:
    """What was written. name: of the bundle on the box. wheels: their file names."""

    path: Path
    name: str
    size_bytes: int
    wheels: tuple[str, ...]


def package(
    bundle: Bundle,
    checkpoint: Checkpoint,
    target: Target,
    stack: Stack,
    out: Path,
    *,
    name: str | None = None,
    wheels: Path | None = None,
    force: bool = False,
    lock: str | None = None,
) -> Package:
    """Write a package; the same inputs give the same bytes.

    Args:
        checkpoint: what the bundle was made from; its logits are recorded for the check on the box.
        out: a file whose name ends in .tar.zst or .tar.
        name: of the bundle on the box; by default its folder's.
        wheels: a folder that holds the box's wheels or gets them; by default they are downloaded anew.
        force: pack a bundle without a passing parity verdict, which the package then says.
        lock: the list of wheels, by default the stack's.
    Raises: InputError if the target needs no package, or the stack does not take the bundle; CheckFailed if the bundle has no
        passing verdict, does not pass its recorded parity set or does not fit; BackendError if the wheels are not to be had.
    """
    _check(bundle, target, stack, force)
    check_name(out)
    name = _name(name, bundle)
    memory = memory_needs(bundle, target, stack, force=force)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with step(f"plan for {target.title}, {stack.name}"):
            bundle.verify_hashes()
            plan(bundle, target, stack, scratch)
        recording = scratch / "recorded.safetensors"
        _recorded(bundle, checkpoint, force).write(recording)
        cache = wheels or scratch / "wheels"
        cache.mkdir(exist_ok=True)
        with step("gather wheels"):
            text = lock or lock_of(stack)
            own, content = own_wheel()
            pinned = gather(text, stack.python or "", cache)
        members = _bundle_members(bundle)
        members |= {f"plan/{file}": Member((scratch / file).read_bytes()) for file in (NETWORK, PLAN)}
        members |= {f"wheels/{file.name}": Member(file) for file in pinned}
        members[f"wheels/{own}"] = Member(content)
        members["wheels.txt"] = Member(text.encode())
        members["parity/recorded.safetensors"] = Member(recording)
        members |= _box_members(name)
        members["box.conf"] = Member(_conf(bundle, target, stack, name, memory, members).encode())
        sums = "".join(f"{member.sha256()}  {path}\n" for path, member in sorted(members.items()))
        members[SUMS] = Member(sums.encode())
        with step(f"write {out}"):
            write(out, f"{name}-{target.name}", members)
        return Package(out, name, out.stat().st_size, tuple(file.name for file in (*pinned, Path(own))))


def _check(bundle: Bundle, target: Target, stack: Stack, force: bool) -> None:
    if target.kind != "jetson" or stack.backend != "tensorrt":
        raise InputError(
            f"--target {target.name}: needs no package; build its engine where TensorRT is: "
            f"`galerne build {bundle.path} --target {target.name}`"
        )
    verdict = parity_of(bundle)
    if verdict != "passed" and not force:
        found = "has no parity verdict" if verdict == "none" else "failed its parity check"
        raise CheckFailed(
            f"{bundle.path}: {found}; `galerne verify {bundle.path} --source CHECKPOINT` gives one (--force packs it so)"
        )
    if verdict != "passed":
        say(f"warning: parity {verdict}, packed with --force; the package says so")


def _name(name: str | None, bundle: Bundle) -> str:
    chosen = name or re.sub(r"[^a-z0-9]+", "-", bundle.path.resolve().name.lower()).strip("-")
    if not _NAME.fullmatch(chosen):
        raise InputError(f"--name: expected up to 40 small letters, digits and dashes, found {chosen!r}")
    return chosen


def _recorded(bundle: Bundle, checkpoint: Checkpoint, force: bool) -> Recording:
    recording = record(bundle, checkpoint)
    if bundle.manifest.graph.compute_type == "bfloat16":
        say("the recorded parity set is not replayed here: ONNX Runtime does not compute in bfloat16")
        return recording
    with step("replay the recorded parity set"):
        found = replay(recording, bundle, PORTABLE)
    if not found.passed and not force:
        failed = "; ".join(f"{case.name} ({', '.join(case.failures)})" for case in found.cases if not case.passed)
        raise CheckFailed(f"{bundle.path}: does not pass its recorded parity set: {failed}")
    return recording


def _bundle_members(bundle: Bundle) -> dict[str, Member]:
    """Return the bundle's files but for its engines, which are of other machines, and a manifest to match."""
    manifest = bundle.manifest
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith(f"{ENGINES}/")}
    parity = {engine: verdict for engine, verdict in manifest.parity.items() if verdict.report in files}
    members = {f"bundle/{name}": Member(bundle.file(name), known_sha256=entry.sha256) for name, entry in files.items()}
    members[f"bundle/{MANIFEST}"] = Member(dataclasses.replace(manifest, files=files, parity=parity).to_json())
    return members


def _box_members(name: str) -> dict[str, Member]:
    box = resources.files(_BOX)
    unit = (box / "unit.service").read_text("utf-8").replace("@NAME@", name)
    return {
        "install.sh": Member((box / "install.sh").read_bytes(), executable=True),
        "bin/galerne": Member((box / "launcher.py").read_bytes(), executable=True),
        f"galerne-{name}.service": Member(unit.encode()),
    }


def _conf(
    bundle: Bundle, target: Target, stack: Stack, name: str, memory: tuple[int, int], members: dict[str, Member]
) -> str:
    """Return what install.sh reads: a line for each value, none of which needs quoting."""
    unpacked = 0
    for path, member in members.items():
        if path.startswith("wheels/") and isinstance(member.content, Path):
            with zipfile.ZipFile(member.content) as wheel:
                unpacked += sum(entry.file_size for entry in wheel.infolist())
    total = sum(member.size for member in members.values())
    strongest = target.power_modes[0] if target.power_modes else None
    values = {
        "format": FORMAT,
        "name": name,
        "target": target.name,
        "stack": stack.name,
        "jetpack": stack.name.removeprefix("jetpack-"),
        "tensorrt": stack.version or "",
        "python": stack.python or "",
        "parity": parity_of(bundle),
        "power_mode": strongest.number if strongest else "",
        "power_mode_name": strongest.name if strongest else "",
        "build_memory_bytes": memory[0],
        "run_memory_bytes": memory[1],
        "disk_bytes": disk_needs(bundle, total, unpacked),
    }
    return "".join(f"{key}={value}\n" for key, value in values.items())
