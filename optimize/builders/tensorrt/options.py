"""What a caller may choose of a TensorRT engine, the profiles that follow from it, and what a stack does not offer."""

from dataclasses import dataclass
from typing import get_args

from galerne.errors import InputError
from galerne.optimize.builders.tensorrt.library import older
from galerne.runtime.engines.record import HardwareCompatibility, Profile, Weights
from galerne.targets.target import Backend, Stack, Target


@dataclass(frozen=True)
class Options:
    """What a caller may choose.

    batch: [min, opt, max] sequences in one run.
    draft: the most tokens that are guessed and checked in one run; 0 for no profile of its own for that.
    weights, hardware_compatibility, version_compatible: as in `EngineRecord`.
    """

    batch: tuple[int, int, int] = (1, 1, 1)
    draft: int = 0
    weights: Weights = "inside"
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False


def read_options(
    *,
    batch: str,
    draft: int,
    strip: bool,
    weight_streaming: bool,
    hardware_compatibility: str,
    version_compatible: bool,
) -> Options:
    """Return the options as a person wrote them.

    Args:
        batch: "MIN:OPT:MAX", or one number for all three.
    Raises: InputError naming the option.
    """
    parts = batch.split(":")
    if len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
        raise InputError(f"--batch: expected MIN:OPT:MAX or one number, found {batch!r}")
    least, opt, most = map(int, parts * 3 if len(parts) == 1 else parts)
    if not 1 <= least <= opt <= most:
        raise InputError(f"--batch: expected MIN:OPT:MAX, rising from 1 or more, found {batch!r}")
    if strip and weight_streaming:
        raise InputError("--strip and --weight-streaming: expected one of them, found both")
    for level in get_args(HardwareCompatibility):
        if hardware_compatibility == level:
            weights: Weights = "stripped" if strip else "streamed" if weight_streaming else "inside"
            return Options((least, opt, most), draft, weights, level, version_compatible)
    expected = ", ".join(get_args(HardwareCompatibility))
    raise InputError(f"--hardware-compatibility: expected one of {expected}, found {hardware_compatibility!r}")


def profiles(options: Options, chunk: int, backend: Backend) -> tuple[Profile, ...]:
    """Return an engine's profiles: `decode`, on request `draft`, and `prefill` with logits for one token or more.

    Args:
        chunk: the bundle's most tokens in one run.
    Raises: InputError if the draft is longer than a run.
    """
    batch = options.batch
    if not 0 <= options.draft < chunk:
        raise InputError(
            f"--draft: expected 0 to {chunk - 1}, found {options.draft}: a draft and the token before it run at once, "
            f"and the bundle was exported with --chunk {chunk}"
        )
    # For products with exactly one row TensorRT-RTX lays float16 weights out anew, and so stores them a second time; it
    # compiles kernels for the true shape when it runs anyway.
    one = (1, 1, min(2, chunk)) if backend == "tensorrt_rtx" else (1, 1, 1)
    made = [Profile("decode", batch, one, one)]
    if options.draft:
        checked = (1, options.draft + 1, options.draft + 1)
        made.append(Profile("draft", batch, checked, checked))
    if chunk > 1:
        made.append(Profile("prefill", batch, (1, chunk, chunk), (1, 1, chunk)))
    return tuple(made)


def check_options(options: Options, target: Target, stack: Stack) -> None:
    """Refuse what a stack does not offer; docs/engines.md has the table and its sources. Raises: InputError."""
    rtx, level = stack.backend == "tensorrt_rtx", options.hardware_compatibility
    where = f"--target {target.name}, stack {stack.name}"
    if options.weights == "streamed" and target.unified_memory:
        raise InputError(
            f"{where}: --weight-streaming: the GPU uses the host's memory here, so there is nowhere to stream from; leave it out"
        )
    if level != "none" and rtx:
        raise InputError(
            f"{where}: --hardware-compatibility: TensorRT-RTX does not have it, its engines are for one compute capability; "
            "build one for each"
        )
    if level != "none" and target.kind == "jetson":
        raise InputError(f"{where}: --hardware-compatibility: TensorRT does not have it on a JetPack; leave it out")
    if level == "ampere_plus" and older(target.compute_capability or "0.0", (8, 0)):
        raise InputError(
            f"{where}: --hardware-compatibility ampere_plus: needs compute capability 8.0 or later, "
            f"found {target.compute_capability}; leave it out"
        )
    if level == "same_compute_capability" and stack.version is not None and older(stack.version, (10, 9)):
        raise InputError(
            f"{where}: --hardware-compatibility same_compute_capability: needs TensorRT 10.9 or later, "
            f"found {stack.version}; leave it out"
        )
    if options.version_compatible and rtx:
        raise InputError(
            f"{where}: --version-compatible: TensorRT-RTX lacks the lean runtime that it takes; build anew for each version"
        )
