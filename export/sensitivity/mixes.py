"""The mixes of formats that are worth having, from the widest to the narrowest: at each size the least harm."""

from collections.abc import Sequence
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
