"""Sampling against transformers' own warpers, and by counting."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from galerne.errors import BackendError, InputError
from galerne.runtime.sampling import Sampler, SamplingOptions


def _logits(size: int, seed: int, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def _reference(logits: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """Return transformers' distribution, [vocab_size], in float64, where borders are not blurred by rounding."""
    warpers: list[Any] = [TemperatureLogitsWarper(options.temperature)]
    if options.top_k is not None:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        warpers.append(TopPLogitsWarper(options.top_p))
    if options.min_p is not None:
        warpers.append(MinPLogitsWarper(options.min_p))
    scores = torch.from_numpy(logits).double()[None]
    for warper in warpers:
        scores = warper(torch.zeros((1, 0), dtype=torch.long), scores)
    return torch.softmax(scores, -1)[0].numpy()


def _ours(logits: np.ndarray, options: SamplingOptions) -> np.ndarray:
    ids, probabilities = Sampler(options).probabilities(logits)
    dense = np.zeros(len(logits))
    dense[ids] = probabilities
    return dense


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 400),
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.1, 1.0, 3.0, 8.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 500),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
)
def test_distribution_is_that_of_transformers(
    size: int,
    seed: int,
    spread: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> None:
    logits = _logits(size, seed, spread)
    options = SamplingOptions(temperature, top_k, top_p, min_p)
    np.testing.assert_allclose(_ours(logits, options), _reference(logits, options), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("spread", [0.0, 0.2, 3.0, 10.0])
def test_large_vocabulary_needs_no_other_result_for_not_being_sorted(spread: float) -> None:
    logits = _logits(150_000, 5, spread) + np.linspace(0, 0.01, 150_000, dtype=np.float32)
    options = SamplingOptions(temperature=1.0, top_p=0.9)
    ours, reference = _ours(logits, options), _reference(logits, options)
    # Among 150,000 near equals rounding may move the border by a few tokens of no weight.
    assert np.abs(ours - reference).sum() < 1e-4


def test_ties_at_the_border_of_top_k_all_stay_and_of_top_p_the_lowest_ids() -> None:
    logits = np.array([0, 1, 1, 1, 1, 0], np.float32)
    assert Sampler(SamplingOptions(1.0, top_k=2)).probabilities(logits)[0].tolist() == [1, 2, 3, 4]
    even = np.zeros(8, np.float32)
    ids, probabilities = Sampler(SamplingOptions(1.0, top_p=0.5)).probabilities(even)
    assert ids.tolist() == [0, 1, 2, 3]
    assert probabilities.tolist() == [0.25] * 4


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([0, 7, -np.inf, 7], np.float32)
    sampler = Sampler(SamplingOptions())
    assert sampler.sample(logits) == 1
    assert sampler.probabilities(logits)[0].tolist() == [1]


def test_draws_as_often_as_the_probabilities_say() -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, -np.inf, 1.5, -3.0], np.float32)
    options = SamplingOptions(temperature=1.3, seed=11)
    draws = 20_000
    sampler = Sampler(options)
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=len(logits))
    expected = _reference(logits, options) * draws
    assert counts[4] == 0
    possible = expected > 0
    chi_square = float((((counts - expected) ** 2)[possible] / expected[possible]).sum())
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


def test_same_seed_same_tokens() -> None:
    steps = [_logits(500, step) for step in range(30)]

    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(1.5, top_k=50, top_p=0.95, seed=seed))
        return [sampler.sample(logits) for logits in steps]

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert run(None) != run(None)


def test_leaves_the_logits_as_they_are() -> None:
    logits = _logits(100, 1)
    before = logits.copy()
    logits.setflags(write=False)
    Sampler(SamplingOptions(0.5, 10, 0.9, 0.1, 0)).sample(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-50, 1e-6])
@pytest.mark.filterwarnings("error")
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = np.array([-1e4, 1e4, 9.99e3, -np.inf], np.float32)
    assert Sampler(SamplingOptions(temperature, seed=0)).sample(logits) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_the_backends_fault(temperature: float, bad: float) -> None:
    logits = np.array([1, 2, bad, 3], np.float32)
    with pytest.raises(BackendError, match="NaN at token 2" if np.isnan(bad) else "no finite largest value"):
        Sampler(SamplingOptions(temperature)).sample(logits)


def test_nothing_left_to_pick_is_the_backends_fault() -> None:
    with pytest.raises(BackendError, match="no finite largest value"):
        Sampler(SamplingOptions()).sample(np.full(4, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("seed", -1),
    ],
)
def test_names_an_option_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}: expected .*, found {value!r}"):
        SamplingOptions(**{name: value})
