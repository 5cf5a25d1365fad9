"""Whether a model fits a target, and how fast it can run there at most."""

from dataclasses import dataclass

from galerne.errors import InputError
from galerne.optimize.fit.bounds import decode_bound, prefill_bound
from galerne.optimize.fit.device import device_of
from galerne.optimize.fit.memory import memory_of
from galerne.optimize.fit.workload import Workload
from galerne.optimize.quantize.recipe import AnyRecipe, check_overrides
from galerne.runtime.footprint import forms_of, weight_names
from galerne.runtime.manifest import ModelFacts
from galerne.targets.target import Stack, Target

# What a stack calls the types that a recipe stores weights in, where it calls them otherwise.
_STACK_TYPES = {"float8e4m3fn": "fp8", "uint8": "int8", "uint4": "int4"}


@dataclass(frozen=True)
class Fit:
    """What one recipe takes of a target, and its bounds.

    fits: it runs: no type is missing, and its peak is within the limit. builds: so is the builder's peak; true where an
        engine is built elsewhere.
    missing_types: types that the recipe needs and the stack does not take.
    memory_bytes: what is there while the model runs, by part. transient_bytes: the most that is there at once while it is
        `loading` or `building` its engine on the target, where that is more; all parts included.
    total_bytes: of memory_bytes. peak_bytes: the most of all but building.
    limit_bytes: what it may take: the target's usable memory, or the budget where that is less. usable_bytes: without a budget.
    decode_bound_tokens_per_s: of all rows together, at the context's end. prefill_bound_tokens_per_s: of all rows together.
    """

    context: int
    batch: int
    chunk: int
    fits: bool
    builds: bool
    missing_types: tuple[str, ...]
    memory_bytes: dict[str, int]
    transient_bytes: dict[str, int]
    total_bytes: int
    peak_bytes: int
    limit_bytes: int
    usable_bytes: int
    decode_bound_tokens_per_s: float
    prefill_bound_tokens_per_s: float


def fit(
    model: ModelFacts,
    recipe: AnyRecipe,
    target: Target,
    stack: Stack,
    *,
    context: int,
    batch: int = 1,
    chunk: int = 256,
    budget_bytes: int | None = None,
    ring_context: int | None = None,
) -> Fit:
    """Say what a model takes of a target.

    Args:
        context: tokens of each row. batch: rows. chunk: the most new tokens of one run.
        budget_bytes: what it may take, where other programs need the rest.
        ring_context: the longest context that the rings are sized for, where that is fixed, as in a bundle; by default `context`.
    Raises: InputError if a number is not at least 1, or an override matches none of the model's weights; BackendError if the
        target is this machine and does not say what it has.
    """
    sizes = {"--context": context, "--batch": batch, "--chunk": chunk, "--memory-budget": budget_bytes}
    for option, number in sizes.items():
        if number is not None and number < 1:
            raise InputError(f"{option}: expected at least 1, found {number}")
    check_overrides(recipe, weight_names(model), f"this {model.architecture}")
    device = device_of(target)
    work = Workload(model, forms_of(recipe.resolved()), context, batch, chunk, max(context, ring_context or 0))
    memory = memory_of(work, target, stack)
    limit = device.usable_bytes if budget_bytes is None else min(budget_bytes, device.usable_bytes)
    missing = missing_types(recipe, stack)
    return Fit(
        context=context,
        batch=batch,
        chunk=chunk,
        fits=not missing and memory.peak <= limit,
        builds=not missing and memory.transient.get("building", 0) <= device.usable_bytes,
        missing_types=missing,
        memory_bytes=memory.parts,
        transient_bytes={what: size for what, size in memory.transient.items() if size > memory.total},
        total_bytes=memory.total,
        peak_bytes=memory.peak,
        limit_bytes=limit,
        usable_bytes=device.usable_bytes,
        decode_bound_tokens_per_s=decode_bound(work, device),
        prefill_bound_tokens_per_s=prefill_bound(work, device),
    )


def missing_types(recipe: AnyRecipe, stack: Stack) -> tuple[str, ...]:
    """Return the types that a recipe needs and a stack does not take."""
    if stack.backend == "onnxruntime":  # the `cpu` engine computes in float32 whatever a bundle is stored in
        return ()
    needed = dict.fromkeys((*(form.dtype for form in recipe.formats), recipe.compute))
    missing = tuple(name for name in needed if _STACK_TYPES.get(name, name) not in stack.types)
    # No TensorRT writes into a ring that is not of floats.
    return missing if recipe.cache is None or not stack.is_tensorrt else (*missing, f"a cache in {recipe.cache}")
