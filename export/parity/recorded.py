"""Makes a recorded parity set: PyTorch's logits for a few hard cases, to be replayed where there is no PyTorch."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from galerne import __version__
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.reference import logits_at
from galerne.export.parity.streamed import StreamedModel, source_window
from galerne.export.parity.tolerances import TABLE, arithmetic
from galerne.export.parity.verify import check_source
from galerne.optimize.quantize.recipe import read_resolved
from galerne.progress import step
from galerne.runtime.bundle import MANIFEST, Bundle
from galerne.runtime.engines.select import CPU, PORTABLE
from galerne.runtime.manifest import GraphFacts
from galerne.runtime.recorded import SCHEMA_VERSION, RecordedCase, Recording, RecordingFacts

# Single steps on each side of the window's edge.
_ABOUT_STEPS = 16
# Positions on each side of an edge whose logits are kept, and others spread over a case: some 40, which are 5 MB at a
# vocabulary of 32,000 and 21 MB at one of 131,072.
_ABOUT, _SPREAD = 3, 8
_SEED = 20261


def record(bundle: Bundle, checkpoint: Checkpoint) -> Recording:
    """Run the checkpoint in transformers, its weights rounded as the bundle's recipe rounds them, and keep its logits.

    Every case is one row, so that an engine of any profile takes it, and about each edge of window and ring there are
    positions on both sides.

    Raises: InputError if the checkpoint is not what the bundle was made from.
    """
    check_source(bundle, checkpoint)
    recipe = read_resolved(bundle.manifest.recipe, f"{bundle.path / MANIFEST}: recipe")
    graph, vocab_size = bundle.manifest.graph, bundle.manifest.model.vocab_size
    window = source_window(checkpoint)  # the source's: a bundle that lost its window is fed beyond it all the same
    cases = _cases(graph, window)
    tokens = np.random.default_rng(_SEED).integers(0, vocab_size, max(sum(case.steps) for case in cases))
    compared = np.unique(np.concatenate([case.positions for case in cases])).astype(np.int64)
    chosen = np.unique(np.concatenate([case.greedy for case in cases])).astype(np.int64)
    streamed = StreamedModel(checkpoint)
    streamed.rounding = recipe
    with step(f"record {len(compared)} of {len(tokens)} positions"):
        asked = np.union1d(compared, chosen)
        logits = logits_at(streamed.model, tokens, asked)
    at_chosen = logits[np.searchsorted(asked, chosen)]
    second, best = np.partition(at_chosen, -2, axis=1)[:, -2:].T
    kept = logits[np.searchsorted(asked, compared)]
    logits_std = float(kept.std())
    limits = {engine: TABLE[arithmetic(recipe, engine)].limits(logits_std) for engine in (PORTABLE, CPU)}
    reference = (
        f"transformers {bundle.manifest.model.architecture}: eager attention, float32, weights rounded by the recipe"
    )
    facts = RecordingFacts(SCHEMA_VERSION, __version__, bundle.fingerprint(), reference, logits_std, limits, cases)
    return Recording(facts, tokens, compared, kept, chosen, at_chosen.argmax(axis=1), best - second)


def _cases(graph: GraphFacts, window: int | None) -> tuple[RecordedCase, ...]:
    """Return the cases. Without a window the edge is that of a run, and the ring has no end to cross."""
    limit = graph.max_context or 1 << 60
    edge = window or graph.chunk
    ring = edge + graph.chunk
    first = max(1, min(edge, limit) - _ABOUT_STEPS)
    one_by_one = _case("greedy tokens one by one over the edge", [first, *[1] * (2 * _ABOUT_STEPS)], limit, edge)
    greedy = tuple(range(first - 1, sum(one_by_one.steps)))
    return (
        _case(f"prompt of {min(edge + 1, limit)}", [edge + 1], limit, edge),
        # Chunks that end nowhere near an edge, past the ring's end.
        _case(
            "uneven chunks over the ring's end", _uneven(ring + graph.chunk // 2 + 5, graph.chunk), limit, edge, ring
        ),
        dataclasses.replace(one_by_one, greedy=greedy),
    )


def _case(name: str, steps: Sequence[int], limit: int, *edges: int) -> RecordedCase:
    kept: list[int] = []
    for count in steps:
        count = min(count, limit - sum(kept))
        if count > 0:
            kept.append(count)
    total = sum(kept)
    near = {place + offset for place in (*edges, total) for offset in range(-_ABOUT, _ABOUT)}
    chosen = {place for place in near if 0 <= place < total}
    chosen.update(np.linspace(0, total - 1, _SPREAD, dtype=np.int64).tolist())
    return RecordedCase(name, tuple(kept), tuple(sorted(chosen)))


def _uneven(total: int, chunk: int) -> list[int]:
    sizes: list[int] = []
    done = 0
    while done < total:
        sizes.append(min((3, chunk, chunk // 2 + 1)[len(sizes) % 3], total - done))
        done += sizes[-1]
    return sizes
