"""What a box must have free: figures of `galerne fit`, for the refusal here and for install.sh to check there."""

from galerne.errors import CheckFailed
from galerne.optimize.fit.memory import memory_of, on_cpu
from galerne.optimize.fit.workload import Workload
from galerne.runtime.bundle import WEIGHTS, Bundle
from galerne.runtime.footprint import forms_of
from galerne.targets.target import Stack, Target

_SLACK = 1 << 28


def memory_needs(bundle: Bundle, target: Target, stack: Stack, *, force: bool) -> tuple[int, int]:
    """Return how many bytes of memory are to be free on the box.

    Returns: while the engine is built and while it runs, whichever is more; and where the portable graph is run on its CPU.
    Raises: CheckFailed if the target has not as much, unless forced.
    """
    model, graph = bundle.manifest.model, bundle.manifest.graph
    longest = max(graph.capacities)
    work = Workload(model, forms_of(bundle.manifest.recipe), longest, 1, graph.chunk, longest)
    on_gpu = memory_of(work, target, stack)
    build = max(on_gpu.peak, on_gpu.transient.get("building", 0))
    usable = target.usable_bytes or 0
    if build > usable and not force:
        raise CheckFailed(
            f"{bundle.path}: takes {build / 1e9:.1f} GB of {target.name} while its engine is built, it has {usable / 1e9:.1f}; "
            f"`galerne fit {bundle.path} --target {target.name}` shows what fits (--force packs it all the same)"
        )
    return build, on_cpu(work, widened=False).peak


def disk_needs(bundle: Bundle, files: int, wheels: int) -> int:
    """Return how many bytes are to be free under the install folder: the files, the wheels unpacked, the engine.

    Args:
        files, wheels: the sizes of all files of the package, and of the wheels unpacked, in bytes.
    """
    return files + bundle.manifest.files[WEIGHTS].size + wheels + _SLACK
