"""The plan: which cases a bundle gets."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from galerne.export.parity.cases import Plan, make_plan
from galerne.runtime.manifest import SCHEMA_VERSION, GraphFacts, Manifest, ModelFacts, Source


def _plan(
    window: int | None,
    chunk: int,
    max_context: int | None,
    *,
    own: int | None = None,
    vocab_size: int = 100,
    layers: int = 1,
    hidden: int = 8,
) -> Plan:
    """Plan for a source with `window`, and a bundle that knows of `own`."""
    own = own or window
    assert own is not None or max_context is not None
    ring = max_context or 0 if own is None else min(own + chunk, max_context or own + chunk)
    graph = GraphFacts("opset24", 24, "float32", min(chunk, max_context or chunk), (ring,), max_context)
    windows = (own,) * layers
    model = ModelFacts("X", layers, hidden, 4 * hidden, 1, 1, hidden, vocab_size, windows, 1e4, 512, False, None, ())
    return make_plan(
        Manifest(SCHEMA_VERSION, "0", Source("safetensors", {}), model, graph, {}, {}), window, greedy=True
    )


def _lengths(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {case.name: case.lengths for case in plan.cases}


def test_windowed() -> None:
    plan = _plan(64, 16, None)
    lengths = _lengths(plan)
    assert [length for name, (length, *_) in lengths.items() if name.startswith("prompt")] == [63, 64, 65, 128, 259]
    assert lengths["token by token"][0] > 2 * (64 + 16)
    assert plan.longest.lengths == (259,)
    assert len(set(lengths["rows of different lengths"])) == 3


def test_without_a_window() -> None:
    lengths = _lengths(_plan(None, 16, 300))
    assert [length for name, (length, *_) in lengths.items() if name.startswith("prompt")] == [1, 16, 17, 35]
    assert "grown ring and full ring" in lengths


def test_a_bundle_that_lost_its_window_is_fed_beyond_it() -> None:
    manifest_knows_none = _plan(64, 16, 2048, own=None)
    assert max(map(max, _lengths(manifest_knows_none).values())) > 4 * 64


def test_greedy_crosses_a_large_window() -> None:
    (case,) = (case for case in _plan(1000, 16, None).cases if case.greedy_tokens)
    assert case.lengths[0] < 1000 < case.lengths[0] + case.greedy_tokens


def test_a_large_model_crosses_each_edge_with_few_tokens() -> None:
    """Mistral 7B: some ten thousand tokens in all, yet single steps and chunks across the window's edge and the ring's."""
    plan = _plan(4096, 256, None, vocab_size=32000, layers=32, hidden=4096)
    cases = {case.name: case for case in plan.cases if not case.greedy_tokens}
    assert sum(sum(case.lengths) for case in cases.values()) < 12_000
    single, position = set(), 0
    for (count,) in cases["step by step across window and ring"].steps:
        if count == 1:
            single.add(position)
        position += count
    assert {*range(4080, 4112), *range(4336, 4368)} <= single and position > 4352 + 256
    position = 0
    for (count,) in cases["chunks across window and ring"].steps:
        chunks = range(position, position + count, 256)
        position += count
    assert not {4096, 4352} & {*chunks} and position > 4352
    compared = plan.positions(cases["step by step across window and ring"])[0]
    assert {4093, 4094, 4095, 4096, 4097, 4098, 4350, 4351, 4352, 4353} <= {*compared.tolist()}
    assert plan.longest.lengths == (515,)
    assert {"rows of different lengths", "poisoned cache", "grown ring and full ring"} <= set(cases)
    assert max(len(sequence) for sequence in plan.sequences) < 5120


def test_positions_of_a_long_case() -> None:
    plan = _plan(1000, 16, None, vocab_size=128_000)
    (positions,) = plan.positions(plan.longest)
    assert {0, 999, 1000, 1016, 2000, 4002} <= set(positions.tolist())
    assert len(positions) <= 60


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(st.none(), st.integers(1, 300)),
    st.integers(1, 64),
    st.one_of(st.none(), st.integers(1, 700)),
    st.integers(10, 200_000),
)
def test_every_plan_can_be_run(window: int | None, chunk: int, max_context: int | None, vocab_size: int) -> None:
    if window is None and max_context is None:
        max_context = 512
    plan = _plan(window, chunk, max_context, vocab_size=vocab_size)
    limit = max_context or 1 << 60
    assert len({case.name for case in plan.cases}) == len(plan.cases) >= 4
    for case in plan.cases:
        assert min(case.lengths) >= 1
        assert max(case.lengths) + max(case.greedy_tokens - 1, 0) <= limit
        for row, (positions, length) in enumerate(zip(plan.positions(case), case.lengths, strict=True)):
            assert len(plan.sequences[row]) >= length
            assert (np.diff(positions) > 0).all() and positions[-1] == length - 1 and positions[0] == 0
    assert all(sequence.max() < vocab_size and sequence.min() >= 0 for sequence in plan.sequences)
