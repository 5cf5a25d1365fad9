"""What a mix has to keep to: a size, a device, or a divergence from the source."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from galerne.errors import CheckFailed
from galerne.export.sensitivity.measured import Measure
from galerne.export.sensitivity.mixes import Mix, filled, narrowed
from galerne.optimize.fit.choice import Case, gigabytes
from galerne.optimize.quantize.recipe import Recipe, WeightFormat
from galerne.progress import say

# The most mixes whose divergence is measured, and how near to the limit the last one may stay.
_TRIES, _NEAR = 8, 0.93
# How much of the limit is aimed at when a mix is narrowed further.
_SHARES = (0.98, 0.9)

Build = Callable[[Mix], Recipe]


class Limit(Protocol):
    """A limit on mixes."""

    def says(self) -> str:
        """Say what it asks for."""
        ...

    def allows(self, form: WeightFormat) -> bool:
        """Whether weights may be stored in a format."""
        ...

    def check_narrowest(self, mix: Mix, recipe: Recipe) -> None:
        """Raises: CheckFailed if the smallest mix that there is does not keep to it, which no measurement is needed for."""
        ...

    def choose(self, found: list[Mix], build: Build, measure: Measure) -> Mix:
        """Return the mix to take of a list from least harm to fewest bytes.

        Raises: CheckFailed if none keeps to it.
        """
        ...


@dataclass(frozen=True)
class SizeLimit:
    """The most that `weights.bin` may take. other_bytes: what it holds beside the groups' weights."""

    max_bytes: int
    other_bytes: int

    def says(self) -> str:
        """Say what it asks for."""
        return f"at most {self.max_bytes / 1e6:.6g} MB of weights"

    def allows(self, form: WeightFormat) -> bool:
        """Any format will do."""
        return True

    def check_narrowest(self, mix: Mix, recipe: Recipe) -> None:
        """Raises: CheckFailed if it is larger."""
        if not self._holds(mix):
            raise CheckFailed(
                f"--max-size: expected at least {mix.bytes + self.other_bytes} bytes, which the narrowest mix takes; "
                f"found {self.max_bytes}"
            )

    def choose(self, found: list[Mix], build: Build, measure: Measure) -> Mix:
        """Return the first that is small enough, with what it leaves spent."""
        first = next(mix for mix in found if self._holds(mix))
        return filled(first, found, self.max_bytes - self.other_bytes)

    def _holds(self, mix: Mix) -> bool:
        return mix.bytes + self.other_bytes <= self.max_bytes


@dataclass(frozen=True)
class TargetLimit:
    """What `galerne fit` says fits a target."""

    case: Case

    def says(self) -> str:
        """Say what it asks for."""
        return f"made to fit {self.case.target.name} with batch {self.case.batch} and context {self.case.context}"

    def allows(self, form: WeightFormat) -> bool:
        """Whether the target's stack has the type."""
        return self.case.stack.backend == "onnxruntime" or form.dtype in self.case.stack.types

    def check_narrowest(self, mix: Mix, recipe: Recipe) -> None:
        """Raises: CheckFailed if it does not fit."""
        fit = self.case.fit(recipe)
        if not fit.fits:
            missing = ", ".join(fit.missing_types)
            why = (
                f"{self.case.stack.name} does not take {missing}"
                if missing
                else f"the narrowest mix takes {gigabytes(fit.peak_bytes)} of {gigabytes(fit.limit_bytes)}"
            )
            raise CheckFailed(f"{self.case.name}: cannot be {self.says()}: {why}")

    def choose(self, found: list[Mix], build: Build, measure: Measure) -> Mix:
        """Return the first that fits."""
        low, high = 0, len(found) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.case.fit(build(found[middle])).fits else (middle + 1, high)
        return found[low]


@dataclass(frozen=True)
class DivergenceLimit:
    """The most KL(source, rounded) in nats, the mean over positions of text that the mix was not chosen by."""

    max_kl: float

    def says(self) -> str:
        """Say what it asks for."""
        return f"at most {self.max_kl:.6g} nats from the source"

    def allows(self, form: WeightFormat) -> bool:
        """Any format will do."""
        return True

    def check_narrowest(self, mix: Mix, recipe: Recipe) -> None:
        """Nothing is known of it before it is measured."""

    def choose(self, found: list[Mix], build: Build, measure: Measure) -> Mix:
        """Return the smallest of those that were measured and keep to it.

        What harms predict tells where to measure first, and each measurement how far the prediction is off.
        """
        kept, over, ratio = -1, len(found), 1.0
        for _ in range(_TRIES):
            if over - kept < 2:
                break
            wanted = self.max_kl * ratio
            number = sum(mix.harm <= wanted for mix in found) - 1
            number = min(max(number, kept + 1), over - 1)
            kl = float(measure.distance(build(found[number])).kl.mean())
            say(f"mix {number + 1} of {len(found)}: KL {kl:.3g}, predicted {found[number].harm:.3g}")
            kept, over = (number, over) if kl <= self.max_kl else (kept, number)
            if self.max_kl * _NEAR <= kl <= self.max_kl:
                break
            if kl > 0 and found[number].harm > 0:
                ratio = found[number].harm / kl
        if kept < 0 and over > 0:
            kl = float(measure.distance(build(found[0])).kl.mean())
            kept = 0 if kl <= self.max_kl else -1
        if kept < 0:
            raise CheckFailed(
                f"--max-kl {self.max_kl:g}: cannot be held: the widest mix is {kl:.3g} nats from the source; allow more"
            )
        return self._spent(found[kept], found, build, measure)

    def _spent(self, mix: Mix, found: list[Mix], build: Build, measure: Measure) -> Mix:
        """Go on past a step that was too large, as that of the vocabulary projection is, with the groups that come after it."""
        kl = float(measure.distance(build(mix)).kl.mean())
        for share in _SHARES:
            if kl >= self.max_kl * _NEAR or mix.harm == 0:
                break
            other = narrowed(mix, found, self.max_kl * share * mix.harm / kl)
            if other != mix and float(measure.distance(build(other)).kl.mean()) <= self.max_kl:
                return other
        return mix
