"""The mixes of formats that are worth having, from the widest to the narrowest: at each size the least harm."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from galerne.optimize.quantize.recipe import WeightFormat


class Option(NamedTuple):
    """A format for a group of weights, what it takes in bytes, and how much it harms, in nats."""

    format: WeightFormat
    bytes: int
    harm: float


@dataclass(frozen=True)
class Mix:
    """An option for each group."""

    options: tuple[Option, ...]

    @property
    def bytes(self) -> int:
        """What all groups take."""
        return sum(option.bytes for option in self.options)

    @property
    def harm(self) -> float:
        """What their harms come to, each measured alone: a prediction of the mix's own."""
        return sum(option.harm for option in self.options)


def mixes(groups: Sequence[Sequence[Option]]) -> list[Mix]:
    """Return mixes from the one with least harm to the smallest, each a step of one group away from the one before.

    Steps are taken in the order of their harm for each byte that they save. Each group goes along the lower convex hull of its
    options, where that ratio only grows, so no mix of the list has a worse one of less harm and no more bytes, but for what lies
    between two steps.
    """
    hulls = [_hull(options) for options in groups]
    steps = sorted(
        ((later.harm - former.harm) / (former.bytes - later.bytes), group, number)
        for group, hull in enumerate(hulls)
        for number, (former, later) in enumerate(pairwise(hull), 1)
    )
    current = [hull[0] for hull in hulls]
    found = [Mix(tuple(current))]
    for _, group, number in steps:
        current[group] = hulls[group][number]
        found.append(Mix(tuple(current)))
    return found


def filled(mix: Mix, found: Sequence[Mix], most_bytes: int) -> Mix:
    """Spend what a mix leaves of a size: widen one group after the other, each time the one that saves most harm and fits."""
    while True:
        wider = [each for each in _neighbours(mix, found) if each.harm < mix.harm and each.bytes <= most_bytes]
        if not wider:
            return mix
        mix = min(wider, key=lambda each: (each.harm, each.bytes))


def narrowed(mix: Mix, found: Sequence[Mix], most_harm: float) -> Mix:
    """Spend what a mix leaves of a harm: narrow one group after the other, each time the one whose harm saves most bytes."""
    while True:
        narrower = [each for each in _neighbours(mix, found) if each.bytes < mix.bytes and each.harm <= most_harm]
        if not narrower:
            return mix
        before = mix
        mix = min(narrower, key=lambda each: (each.harm - before.harm) / (before.bytes - each.bytes))


def _neighbours(mix: Mix, found: Sequence[Mix]) -> Iterator[Mix]:
    """Yield a mix with another option for one of its groups, for each that some mix has."""
    for group, options in enumerate(zip(*(each.options for each in found), strict=True)):
        for option in dict.fromkeys(options):
            yield Mix((*mix.options[:group], option, *mix.options[group + 1 :]))


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of harm over bytes, from the least harm down to the fewest bytes."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.harm, option.bytes)):
        if hull and option.bytes >= hull[-1].bytes:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(wide: Option, narrow: Option) -> float:
    return (narrow.harm - wide.harm) / (wide.bytes - narrow.bytes)
