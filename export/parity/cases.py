"""The cases that a bundle is compared on, made from its manifest: each is data, and names what it would catch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from galerne.runtime.footprint import linear_shapes
from galerne.runtime.manifest import GraphFacts, Manifest, ModelFacts
from galerne.runtime.ring import Ring

Int64 = npt.NDArray[np.int64]
RingSize = Literal["growing", "full"]

GREEDY_TOKENS = 256
# Compared logits of one case: enough positions to see every edge, few enough to hold for a vocabulary of 150,000.
_MOST_POSITIONS, _FEWEST_POSITIONS, _MOST_LOGITS = 200, 32, 4 << 20
_SEED = 20260
# Tokens times weights of all cases together. Beyond it a model with a window gets shorter cases: this much takes two cores some
# ten minutes.
_MOST_WORK = 3e13
# Single steps on each side of an edge that a large model is taken across.
_ABOUT_EDGE = 16


@dataclass(frozen=True)
class Case:
    """One comparison.

    steps: what is fed, one run after the other: the number of tokens that each row gets. Row r is fed sequence r.
    rings: how the cache is allocated; with two, both are run and each is compared with the reference.
    poisoned: whether the cache is filled with large values before use.
    greedy_tokens: tokens to generate freely after the steps, whose ids are compared and not logits.
    """

    name: str
    steps: tuple[tuple[int, ...], ...]
    rings: tuple[RingSize, ...] = ("growing",)
    poisoned: bool = False
    greedy_tokens: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each row is fed."""
        return tuple(sum(counts) for counts in zip(*self.steps, strict=True))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what a runner returns for it."""
        return ("tokens",) if self.greedy_tokens else tuple(f"logits_{ring}_ring" for ring in self.rings)


@dataclass(frozen=True)
class Plan:
    """What a bundle is compared on.

    sequences: random token ids, [tokens] int64 each. Every case feeds prefixes of them, so that the reference needs one
        pass over each: what stands later does not change what came before.
    window: the source's. capacity: the slots of the smallest ring at its full size.
    """

    cases: tuple[Case, ...]
    sequences: tuple[Int64, ...]
    window: int | None
    capacity: int
    vocab_size: int

    @property
    def longest(self) -> Case:
        """The case of one row with the longest prompt that is all it feeds."""
        alone = [case for case in self.cases if len(case.lengths) == len(case.steps) == 1 and not case.greedy_tokens]
        return max(alone, key=lambda case: case.steps[0][0])

    def positions(self, case: Case) -> list[Int64]:
        """Return the positions of each row at which logits are compared, ascending."""
        limit = min(_MOST_POSITIONS, max(_FEWEST_POSITIONS, _MOST_LOGITS // self.vocab_size)) // len(case.lengths)
        return [_spread(length, limit, self.window or 0, self.capacity) for length in case.lengths]


def make_plan(manifest: Manifest, window: int | None, *, greedy: bool) -> Plan:
    """Return the cases for a bundle.

    Args:
        window: the source's, and not the manifest's: a bundle that lost its window must be fed beyond it all the same.
        greedy: whether to generate freely too.
    """
    graph = manifest.graph
    limit = graph.max_context or 1 << 60
    cases = tuple(_windowed(graph, window, limit) if window else _unwindowed(graph, limit))
    bounded = sum(sum(case.lengths) for case in cases) * _weights(manifest.model) > _MOST_WORK
    if bounded and window:
        cases = (*_across(graph, window, limit), *_unwindowed(graph, limit))
    if greedy:
        # With a window the prompt ends where the generated tokens cross its edge.
        prompt = min(max(8, 0 if bounded else (window or 0) - GREEDY_TOKENS // 2), max(1, limit // 2))
        count = min(GREEDY_TOKENS, limit - prompt + 1)
        cases += (Case("greedy tokens", ((prompt,),), greedy_tokens=count),)
    rng = np.random.default_rng(_SEED)
    lengths = [0] * max(len(case.lengths) for case in cases)
    for case in cases:
        for row, length in enumerate(case.lengths):
            lengths[row] = max(lengths[row], length)
    sequences = tuple(rng.integers(0, manifest.model.vocab_size, length) for length in lengths)
    return Plan(cases, sequences, window, min(graph.capacities), manifest.model.vocab_size)


def _windowed(graph: GraphFacts, window: int, limit: int) -> Iterable[Case]:
    yield from _prompts((window - 1, window, window + 1, 2 * window, 4 * window + 3), limit)
    yield from _common(graph, limit, rows=(2 * window + 1, 3, window + 1), chunked=2 * window + graph.chunk + 5)
    yield from _poisoned(window // 2, limit)
    # Twice around the ring and some more, so that every slot is written three times.
    yield Case("token by token", ((1,),) * min(2 * min(*graph.capacities, window + graph.chunk) + 8, limit))


def _across(graph: GraphFacts, window: int, limit: int) -> Iterable[Case]:
    """Yield what a large model is fed in place of many long prompts: each edge crossed once step by step, once in chunks."""
    ring, steps, done = window + graph.chunk, [], 0
    for edge in (window, ring):
        before = max(done, edge - _ABOUT_EDGE)
        steps += [(before - done,)] * (before > done) + [(1,)] * (edge + _ABOUT_EDGE - before)
        done = edge + _ABOUT_EDGE
    yield Case("step by step across window and ring", _capped([*steps, (graph.chunk + 5,)], limit))
    # Three tokens first, so that no chunk ends at an edge.
    yield Case("chunks across window and ring", _capped([(3,), (ring + graph.chunk // 2,)], limit))


def _unwindowed(graph: GraphFacts, limit: int) -> Iterable[Case]:
    chunk = graph.chunk
    yield from _prompts((1, chunk, chunk + 1, 2 * chunk + 3), limit)
    yield from _common(graph, limit, rows=(chunk // 4 + 3, 3, chunk // 8 + 1), chunked=chunk + 25)
    yield from _poisoned(chunk // 8, limit)
    yield Case("token by token", ((1,),) * min(64, limit))


def _prompts(lengths: Iterable[int], limit: int) -> Iterable[Case]:
    for length in sorted({min(length, limit) for length in lengths} - {0}):
        yield Case(f"prompt of {length}", ((length,),))


def _common(graph: GraphFacts, limit: int, *, rows: tuple[int, int, int], chunked: int) -> Iterable[Case]:
    yield Case("uneven chunks", tuple((count,) for count in _uneven(min(chunked, limit), graph.chunk)))
    # A row that gets nothing in a step must keep its place, while padding is written behind it.
    decode = ((1, 1, 1), (1, 0, 1), (0, 1, 1), (1, 1, 0), (2, 1, 3), (1, 1, 1))
    room = limit - max(sum(counts) for counts in zip(*decode, strict=True))
    if room > 0:
        yield Case("rows of different lengths", (tuple(min(length, room) for length in rows), *decode))
    small, full = min(Ring(graph, 1).capacities), min(graph.capacities)
    if small < full:  # else the ring never grows
        steps = [(small - 3,), (1,), (1,), (1,), (1,), (min(full - small, 16),), (1,)]
        yield Case("grown ring and full ring", _capped(steps, limit), rings=("growing", "full"))


def _poisoned(prompt: int, limit: int) -> Iterable[Case]:
    # Shorter than the ring, so that slots stay poisoned to the end.
    yield Case(
        "poisoned cache", _capped([(max(1, prompt),), (1,), (1,), (3,), (1,)], limit), rings=("full",), poisoned=True
    )


def _uneven(total: int, chunk: int) -> Iterable[int]:
    sizes = (1, 7, chunk, 3, chunk + 2)
    done = turn = 0
    while done < total:
        size = min(sizes[turn % len(sizes)], total - done)
        yield size
        done, turn = done + size, turn + 1


def _capped(steps: Sequence[tuple[int]], limit: int) -> tuple[tuple[int], ...]:
    kept: list[tuple[int]] = []
    for (count,) in steps:
        count = min(count, limit - sum(size for (size,) in kept))
        if count > 0:
            kept.append((count,))
    return tuple(kept)


def _spread(length: int, limit: int, window: int, capacity: int) -> Int64:
    """Choose at most about `limit` of `length` positions: the ends, those about each edge of window and ring, and others."""
    if length <= limit:
        return np.arange(length)
    edges = [0, length, window, 2 * window, capacity, 2 * capacity, window + capacity]
    near = {edge + offset for edge in edges for offset in range(-3, 3)}
    chosen = {position for position in near if 0 <= position < length}
    chosen.update(np.linspace(0, length - 1, max(0, limit - len(chosen)), dtype=np.int64).tolist())
    return np.array(sorted(chosen), np.int64)


def _weights(model: ModelFacts) -> int:
    layer = sum(rows * columns for rows, columns in linear_shapes(model))
    return model.num_hidden_layers * layer + model.vocab_size * model.hidden_size
