"""Refuses to build what the target's memory does not hold, before an hour goes into it."""

from galerne.errors import CheckFailed
from galerne.optimize.fit.choice import Case, assess, gigabytes
from galerne.optimize.quantize.recipe import load, names, read_resolved
from galerne.runtime.bundle import MANIFEST, Bundle
from galerne.targets.target import Stack, Target


def check_fit(bundle: Bundle, target: Target, stack: Stack, *, batch: int = 1) -> None:
    """Hold an engine for a GPU against the memory of its target: its rings have their full size, as they do there.

    Args:
        batch: the most rows of a run.
    Raises: CheckFailed if it does not fit, or is built on a box that does not hold the builder too; with what would fit.
    """
    facts, graph = bundle.manifest.model, bundle.manifest.graph
    own = read_resolved(bundle.manifest.recipe, f"{bundle.path / MANIFEST}: recipe")
    context = graph.max_context or max(graph.capacities)
    case = Case(
        str(bundle.path), facts, target, stack, context, batch, graph.chunk, graph.max_context, fixed_rings=True
    )
    found = case.fit(own)
    if found.peak_bytes > found.limit_bytes:
        named = next((name for name in names() if load(name).resolved() == own.resolved()), "its own recipe")
        raise CheckFailed(f"{assess(case, own, named).refusal()} (--force overrides)")
    building = found.transient_bytes.get("building", 0)
    if stack.builds_on == "device" and not found.builds and building:
        raise CheckFailed(
            f"{bundle.path}: fits {target.name} when it is built, but TensorRT takes {gigabytes(building)} there to build it, of "
            f"usable {gigabytes(found.usable_bytes)}; export with a narrower --precision, or free memory (--force overrides)"
        )
