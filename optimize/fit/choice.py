"""Every recipe against a target: which fit, which is the best of them, and how far context and batch can go."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from galerne.errors import InputError
from galerne.optimize.fit.bounds import decode_bound
from galerne.optimize.fit.device import Device, device_of
from galerne.optimize.fit.fit import Fit, fit
from galerne.optimize.fit.workload import Workload
from galerne.optimize.quantize.recipe import AnyRecipe, Recipe, load, names
from galerne.runtime.footprint import decode_weight_bytes, forms_of
from galerne.runtime.manifest import ModelFacts
from galerne.targets.target import Stack, Target

# Tokens that are asked about where nobody says.
DEFAULT_CONTEXT = 4096
_MOST_ROWS = 1 << 16
# Checkpoints are published in 16 bits: float32 keeps no more of them.
_WIDEST_BYTES = 2


@dataclass(frozen=True)
class Case:
    """A model as it is asked about, on a target.

    name: what to call it. own_recipe: the bundle's, by its name, where the model is a bundle's.
    max_context: the longest that the model, or the bundle, takes; None where there is no limit.
    fixed_rings: whether the rings have the size for max_context, whatever context is asked about.
    """

    name: str
    model: ModelFacts
    target: Target
    stack: Stack
    context: int
    batch: int
    chunk: int
    max_context: int | None
    budget_bytes: int | None = None
    fixed_rings: bool = False

    def fit(self, recipe: AnyRecipe, *, context: int | None = None, batch: int | None = None) -> Fit:
        """Say what a recipe takes, here or at another context or batch."""
        return fit(
            self.model,
            recipe,
            self.target,
            self.stack,
            context=context or self.context,
            batch=batch or self.batch,
            chunk=self.chunk,
            budget_bytes=self.budget_bytes,
            ring_context=self.max_context if self.fixed_rings else None,
        )

    def check_context(self) -> None:
        """Raises: InputError if the context is beyond the longest."""
        if self.max_context is not None and self.context > self.max_context:
            raise InputError(f"--context {self.context}: the longest context of {self.name} is {self.max_context}")


@dataclass(frozen=True)
class Assessment:
    """What there is to say of a case.

    recipe: the name of the one that was asked about, or the best that fits, or where none does the smallest. chosen: its fit.
    max_context: the longest context with this batch, which a bundle may have to be exported for; None where any length fits,
        0 where none does.
    max_batch: the most rows at this context; 0 where not even one fits.
    recipes: those that ship and round to nearest, by name, widest first; others are as large as these.
    best: the widest that fits and has at most 16 bits a weight; None where none fits.
    power_modes: the bound on decoding in each mode of the target.
    """

    case: Case
    recipe: str
    chosen: Fit
    max_context: int | None
    max_batch: int
    recipes: dict[str, Fit]
    best: str | None
    power_modes: dict[str, float]

    def remedy(self) -> str:
        """Say what would fit in place of what does not."""
        at = f"batch {self.case.batch} and context {self.case.context}"
        ways = []
        if self.best is not None:
            ways.append(f"at {at} the recipe {self.best} fits, {gigabytes(self.recipes[self.best].peak_bytes)}")
        if self.max_context and self.case.fixed_rings:
            ways.append(f"exported with --max-context {self.max_context} it fits")
        elif self.max_context:
            ways.append(f"with --context {self.max_context} it fits")
        elif self.max_batch:
            ways.append(f"with --batch {self.max_batch} it fits")
        return ", or ".join(ways) or f"no recipe fits at {at}"

    def refusal(self) -> str:
        """Say on one line why it does not fit and what would."""
        case, chosen = self.case, self.chosen
        what = f"{case.name} as {self.recipe} does not fit {case.target.name}"
        if chosen.missing_types:
            return f"{what}: {case.stack.name} does not take {', '.join(chosen.missing_types)}; {self.remedy()}"
        limit = "the budget of" if chosen.limit_bytes < chosen.usable_bytes else "the usable"
        return (
            f"{what}: it takes {gigabytes(chosen.peak_bytes)}, {gigabytes(chosen.peak_bytes - chosen.limit_bytes)} more than "
            f"{limit} {gigabytes(chosen.limit_bytes)}; {self.remedy()}"
        )

    def tree(self) -> dict[str, Any]:
        """Return all of it as tables, lists and plain values."""
        case = self.case
        return {
            "model": case.name,
            "target": case.target.name,
            "stack": case.stack.name,
            "recipe": self.recipe,
            **dataclasses.asdict(self.chosen),
            "max_context": self.max_context,
            "max_batch": self.max_batch,
            "best_recipe": self.best,
            "power_modes": self.power_modes,
            "recipes": [{"name": name, **dataclasses.asdict(each)} for name, each in self.recipes.items()],
        }


def assess(case: Case, recipe: AnyRecipe | None = None, recipe_name: str | None = None) -> Assessment:
    """Hold a case against its target.

    Args:
        recipe: what to ask about; by default the best that fits. recipe_name: what to call it.
    Raises: InputError if a number is below 1 or the context is beyond the longest.
    """
    case.check_context()
    shipped = {name: load(name) for name in names()}
    # How a weight is rounded changes neither its size nor the speed: one recipe stands for all that store it alike.
    loaded: dict[str, AnyRecipe] = {name: each for name, each in shipped.items() if each.method == "nearest"}
    order = sorted(loaded, key=lambda name: _width(case.model, loaded[name]), reverse=True)
    fits = {name: case.fit(loaded[name]) for name in order}
    best = next((name for name in order if fits[name].fits and _bytes(loaded[name]) <= _WIDEST_BYTES), None)
    if recipe is None:
        recipe_name = best or order[-1]
        recipe = loaded[recipe_name]
    assert recipe_name is not None
    device = device_of(case.target)
    work = Workload(case.model, forms_of(recipe.resolved()), case.context, case.batch, case.chunk, case.context)
    return Assessment(
        case,
        recipe_name,
        case.fit(recipe),
        _max_context(case, recipe),
        _largest(lambda batch: case.fit(recipe, batch=batch).fits, _MOST_ROWS),
        fits,
        best,
        _power_modes(case, work, device),
    )


def gigabytes(size: float) -> str:
    """Write a number of bytes for a person, in 10^9."""
    return f"{size / 1e9:.2f} GB"


def _width(model: ModelFacts, recipe: AnyRecipe) -> tuple[int, bool, bool]:
    """Return what recipes are ordered by: the bytes of their products; of two alike float16, and what needs no text, go first."""
    calibrated = isinstance(recipe, Recipe) and recipe.calibrated
    return decode_weight_bytes(model, forms_of(recipe.resolved())), recipe.compute == "float16", not calibrated


def _bytes(recipe: AnyRecipe) -> float:
    return forms_of(recipe.resolved()).weights.bytes_per_weight()


def _max_context(case: Case, recipe: AnyRecipe) -> int | None:
    case = dataclasses.replace(case, fixed_rings=False)  # a bundle can be exported for less
    if case.max_context is None:
        # Every layer has a window, so rings stop growing at the longest one and a chunk.
        full = max(window for window in case.model.layer_windows if window is not None) + case.chunk
        if case.fit(recipe, context=full).fits:
            return None
    else:
        full = case.max_context
    return _largest(lambda context: case.fit(recipe, context=context).fits, full)


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` for which something holds that holds for all below it; 0 if for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _power_modes(case: Case, work: Workload, device: Device) -> dict[str, float]:
    return {mode.name: decode_bound(work, device, mode.bandwidth_bytes_per_s) for mode in case.target.power_modes}
