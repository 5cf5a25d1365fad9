"""Builds the engine of a bundle for a target and enters it into the bundle."""

from collections.abc import Callable
from pathlib import Path

from galerne.errors import CheckFailed, InputError
from galerne.files import staged_folder
from galerne.runtime.bundle import ENGINES, Bundle
from galerne.runtime.engines.record import RECORD, EngineRecord, parity_of
from galerne.targets.target import Stack, Target

Builder = Callable[[Bundle, Target, Stack, Path], EngineRecord]


def build(bundle: Bundle, target: Target, *, stack: str | None = None, force: bool = False) -> Bundle:
    """Build an engine into `engines/<target>` and return the bundle that lists it.

    Args:
        stack: the name of one of the target's, by default its first.
        force: replace an engine that is there, and build from a bundle whose parity check failed.
    Raises: InputError if there is one already or the target cannot take the bundle, CheckFailed if the bundle failed its
        parity check, BackendError if the builder is missing or fails.
    """
    if target.name in bundle.engines() and not force:
        raise InputError(f"{bundle.path}: has an engine for {target.name} already; build it anew with --force")
    if parity_of(bundle) == "failed" and not force:
        raise CheckFailed(f"{bundle.path}: its parity check failed, so no engine is built from it (--force overrides)")
    chosen = target.stack(stack)
    folder = f"{ENGINES}/{target.name}"
    bundle.file(ENGINES).mkdir(exist_ok=True)
    with staged_folder(bundle.file(folder), replace=True) as staging:
        record = _builder(chosen)(bundle, target, chosen, staging)
        (staging / RECORD).write_bytes(record.to_json())
    files = sorted(path.name for path in bundle.file(folder).iterdir())
    return bundle.with_files(folder, [f"{folder}/{name}" for name in files])


def _builder(stack: Stack) -> Builder:
    """Import the builder of the stack's backend: each brings a library that may be missing."""
    if stack.backend == "onnxruntime":
        from galerne.optimize.builders.ort_cpu import build_ort_cpu

        return build_ort_cpu
    if stack.backend == "tensorrt_rtx":
        from galerne.optimize.builders.tensorrt_rtx import build_tensorrt_rtx

        return build_tensorrt_rtx
    raise InputError(f"--stack {stack.name}: no builder for its backend {stack.backend!r} in this version of Galerne")
