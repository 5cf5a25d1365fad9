"""Builds the engine of a bundle for a target and enters it into the bundle."""

import tempfile
from pathlib import Path

from galerne.errors import BackendError, CheckFailed, InputError
from galerne.files import staged_folder
from galerne.optimize.builders.fits import check_fit
from galerne.optimize.builders.tensorrt.build_plan import NETWORK
from galerne.optimize.builders.tensorrt.compile import TIMING_CACHE, Timings, compile_plan
from galerne.optimize.builders.tensorrt.library import import_library, is_version
from galerne.optimize.builders.tensorrt.options import Options
from galerne.optimize.builders.tensorrt.plan import plan
from galerne.optimize.check import check_cache
from galerne.runtime.bundle import ENGINES, WEIGHTS, Bundle
from galerne.runtime.engines.record import RECORD, EngineRecord, parity_of
from galerne.runtime.engines.tensorrt.package import NAMES
from galerne.targets.target import Stack, Target


def choose_stack(target: Target, name: str | None = None) -> tuple[Stack, str]:
    """Return one of the target's stacks, and why it.

    Without a name it is the first whose builder is installed here in the stack's version; where there is none, the first whose
    builder is here in any, but for a box, which has the version that it has. ONNX Runtime's builder is everywhere.

    Raises: InputError if there is none of that name.
    """
    if name is not None:
        return target.stack(name), "as --stack says"
    other: tuple[Stack, str] | None = None
    for stack in target.stacks:
        if not stack.is_tensorrt:
            if other is None:
                before = stack is not target.stacks[0]
                return stack, "it needs nothing else" + (", and no TensorRT is installed here" if before else "")
            continue
        try:
            library = import_library(stack.backend)
        except BackendError:
            continue
        if stack.version is None or is_version(library.version, stack.version):
            return stack, f"{library.title} is installed here"
        if other is None and stack.builds_on != "device":
            other = stack, f"{library.title} is installed here, though what is known of it is of {stack.version}"
    first = target.stacks[0]
    return other or (
        first,
        f"its first; {NAMES.get(first.backend, first.backend)} is not installed here, nor another's builder",
    )


def build(
    bundle: Bundle,
    target: Target,
    *,
    stack: Stack | None = None,
    options: Options | None = None,
    locked: bool = False,
    force: bool = False,
) -> Bundle:
    """Build an engine into `engines/<target>` and return the bundle that lists it.

    Args:
        stack: one of the target's, by default what `choose_stack` gives.
        options: of an engine for a GPU.
        locked: fail where the timing cache of the engine that is there lacks what the build needs, so that a rebuild is the same.
        force: replace an engine that is there, and build from a bundle that failed its parity or quality check, or does not fit.
    Raises: InputError if there is one already or the target cannot take the bundle, CheckFailed if the bundle failed its
        parity or quality check or does not fit, BackendError if the builder is missing or fails.
    """
    # A locked build makes the same again: it is there to replace what is there.
    if target.name in bundle.engines() and not force and not locked:
        raise InputError(f"{bundle.path}: has an engine for {target.name} already; build it anew with --force")
    if parity_of(bundle) == "failed" and not force:
        raise CheckFailed(f"{bundle.path}: its parity check failed, so no engine is built from it (--force overrides)")
    poor = [engine for engine, verdict in bundle.manifest.quality.items() if not verdict.passed]
    if poor and not force:
        raise CheckFailed(
            f"{bundle.path}: its quality on text, run as {poor[0]}, is not enough, so no engine is built from it; see "
            f"{bundle.manifest.quality[poor[0]].report} and choose another recipe (--force overrides)"
        )
    chosen = stack or choose_stack(target)[0]
    options = options or Options()
    check_cache(bundle, target, chosen)
    # Weights that stream need not fit.
    if target.kind != "cpu" and options.weights != "streamed" and not force:
        check_fit(bundle, target, chosen, batch=options.batch[2])
    folder = f"{ENGINES}/{target.name}"
    bundle.file(ENGINES).mkdir(exist_ok=True)
    timings = _timings(bundle, target, chosen, locked)
    with staged_folder(bundle.file(folder), replace=True) as staging:
        record = _build(bundle, target, chosen, staging, options, timings)
        (staging / RECORD).write_bytes(record.to_json())
    files = sorted(path.name for path in bundle.file(folder).iterdir())
    return bundle.with_files(folder, [f"{folder}/{name}" for name in files])


def _timings(bundle: Bundle, target: Target, stack: Stack, locked: bool) -> Timings:
    if locked and stack.backend != "tensorrt":
        raise InputError(
            f"--locked: {NAMES.get(stack.backend, stack.backend)} measures nothing while it builds, so there is no timing cache "
            "to hold it to; leave it out"
        )
    name = f"{ENGINES}/{target.name}/{TIMING_CACHE}"
    if stack.backend == "tensorrt" and name in bundle.manifest.files:
        bundle.verify_hashes([name])
        return Timings(bundle.file(name).read_bytes(), locked)
    if locked:
        raise InputError(
            f"--locked: {bundle.path / name}: no timing cache of an earlier build; build without --locked first"
        )
    return Timings()


def _build(
    bundle: Bundle, target: Target, stack: Stack, folder: Path, options: Options, timings: Timings
) -> EngineRecord:
    """Build with the stack's backend: each brings a library that may be missing."""
    if not stack.is_tensorrt:
        if options != Options():
            raise InputError(
                f"--target {target.name}: stack {stack.name} takes none of TensorRT's options; leave them out"
            )
        if stack.backend == "onnxruntime_cuda":
            from galerne.optimize.builders.ort_cuda import build_ort_cuda

            return build_ort_cuda(bundle, target, stack, folder)
        from galerne.optimize.builders.ort_cpu import build_ort_cpu

        return build_ort_cpu(bundle, target, stack, folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = plan(bundle, target, stack, Path(scratch), options)
        network = Path(scratch) / NETWORK
        record = compile_plan(made, network, bundle.file(WEIGHTS), folder, timings)
        if made.weights == "stripped":  # whoever refits the engine reads the weights' names there
            network.rename(folder / NETWORK)
    return record
