"""Searched scales: less error than with the smallest that clips nothing, whatever the weights, and the same for any tiling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galerne.optimize.quantize import search as module
from galerne.optimize.quantize.rounding import dequantize, quantize, round_to, scales_of
from galerne.optimize.quantize.search import scales_by, searched_scales


def weights(rows: int, columns: int, seed: int = 0, degrees: float = 5) -> np.ndarray:
    values: np.ndarray = np.random.default_rng(seed).standard_t(degrees, (rows, columns)).astype(np.float32)
    return values * np.float32(0.02)


def errors(weight: np.ndarray, scale: np.ndarray, bits: int, power: int = 3) -> np.ndarray:
    """Return |error|**power of each weight in float64."""
    return np.abs(weight.astype(np.float64) - dequantize(round_to(weight, scale, bits), scale)) ** power


def by_block(values: np.ndarray, block: int) -> np.ndarray:
    sums: np.ndarray = values.reshape(len(values), -1, block).sum(axis=-1)
    return sums


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 10_000),
    degrees=st.sampled_from([2, 5, 50]),
)
def test_no_block_has_more_error_than_without_the_search(bits: int, block: int, seed: int, degrees: float) -> None:
    weight = weights(4, 2 * block, seed, degrees)
    found, plain = (errors(weight, scales(weight, bits, block), bits) for scales in (searched_scales, scales_of))
    assert (by_block(found, block) <= by_block(plain, block) * 1.0001).all()


@pytest.mark.parametrize("importance", [False, True])
def test_the_scales_are_the_best_of_a_fine_grid(importance: bool) -> None:
    """Within 3 % of the error that two thousand scales, tried one by one in float64, can reach."""
    weight = weights(8, 128)
    counts = np.exp(np.random.default_rng(1).standard_normal(128)).astype(np.float32)
    found = searched_scales(weight, 4, 64, counts if importance else None)

    def total(scale: np.ndarray) -> np.ndarray:
        return by_block(errors(weight, scale, 4, 2) * counts if importance else errors(weight, scale, 4), 64)

    plain = scales_of(weight, 4, 64)
    best = np.min([total((plain * factor).astype(np.float16)) for factor in np.linspace(0.4, 1.1, 2000)], axis=0)
    assert total(found).sum() <= best.sum() * 1.03
    assert total(found).sum() < 0.9 * total(plain).sum()


def test_a_block_depends_on_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export sees tiles, a reference whole rows: both must find the same scales, in whatever place a block is."""
    weight = weights(37, 512)
    whole = searched_scales(weight, 4, 64)
    monkeypatch.setattr(module, "_TILE", 1024)
    assert np.array_equal(searched_scales(weight, 4, 64), whole)
    assert np.array_equal(searched_scales(weight[5:8, 64:192], 4, 64), whole[5:8, 1:3])


def test_importance_makes_a_channel_better_and_its_size_does_not_count() -> None:
    weight = weights(64, 128, degrees=50)
    counts = np.ones(128, np.float32)
    counts[7] = 1000
    found = searched_scales(weight, 4, 128, counts)
    assert errors(weight, found, 4)[:, 7].sum() < 0.5 * errors(weight, searched_scales(weight, 4, 128), 4)[:, 7].sum()
    assert np.array_equal(searched_scales(weight, 4, 128, counts * 2**-60), found)


def test_zeros_stay_zero_with_the_scale_1() -> None:
    assert (searched_scales(np.zeros((2, 64), np.float32), 4, 32) == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e7])
def test_what_float16_cannot_scale_shows_in_its_block(bad: float) -> None:
    weight = weights(2, 64)
    weight[1, 40] = bad
    assert np.isfinite(searched_scales(weight, 4, 32)).tolist() == [[True, True], [True, False]]


def test_weights_on_a_grid_are_kept() -> None:
    """Nothing is clipped where that only adds error."""
    values = np.random.default_rng(0).integers(-8, 8, (4, 64)).astype(np.int8)
    values[:, ::32] = -8
    weight = dequantize(values, np.full((4, 2), 0.125, np.float16))
    assert np.array_equal(round_to(weight, searched_scales(weight, 4, 32), 4), values)
    assert np.array_equal(quantize(weight, 4, 32)[0], values)


def test_what_a_method_finds_scales_by() -> None:
    assert scales_by("search", 4) is searched_scales
    assert scales_by("nearest", 4) is scales_by("search", 8) is scales_of
