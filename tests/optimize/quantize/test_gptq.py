"""GPTQ against a plain loop over the inverse of the Hessian, as its authors write it, and against rounding to nearest."""

import gc
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galerne.errors import InputError
from galerne.optimize.quantize.gptq import gptq
from galerne.optimize.quantize.rounding import dequantize, quantize, round_to


def problem(rows: int, columns: int, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight [rows, columns], and the Hessian of inputs whose channels depend on each other and differ in size."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns)) * columns**-0.5 + np.eye(columns)
    inputs = rng.standard_normal((samples, columns)) @ mixing * np.exp(rng.standard_normal(columns))
    weight = rng.standard_normal((rows, columns)) * 0.02
    return weight.astype(np.float32), (inputs.T @ inputs / samples).astype(np.float32)


def error(weight: np.ndarray, rounded: tuple[np.ndarray, np.ndarray], hessian: np.ndarray) -> float:
    """Return tr(E H E^T)."""
    difference = (weight - dequantize(*rounded)).astype(np.float64)
    return float(((difference @ hessian) * difference).sum())


def by_the_inverse(
    weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, bits: int, damping: float = 0.01
) -> np.ndarray:
    """Return the values that Frantar et al.'s algorithm 1 gives in float64, one channel after the other, none in blocks."""
    low, high = {4: (-8, 7), 8: (-127, 127)}[bits]
    rows, columns = weight.shape
    order = np.argsort(np.diagonal(hessian), kind="stable")[::-1]
    damped = hessian.astype(np.float64) + damping * np.diagonal(hessian).mean() * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    left, steps = weight.astype(np.float64)[:, order], np.repeat(scale.astype(np.float64), columns // scale.shape[1], 1)
    values = np.empty((rows, columns), np.int8)
    for place, channel in enumerate(order):
        step = steps[:, channel]
        values[:, channel] = np.clip(np.rint(left[:, place] / step), low, high)
        missing = (left[:, place] - values[:, channel] * step) / upper[place, place]
        left[:, place:] -= np.outer(missing, upper[place, place:])
    return values


@pytest.mark.parametrize(("bits", "columns", "block"), [(4, 256, 128), (4, 96, 32), (8, 200, 200)])
def test_the_same_as_the_authors_algorithm(bits: int, columns: int, block: int) -> None:
    weight, hessian = problem(24, columns, 4 * columns)
    values, scale = gptq(weight, hessian, bits, block)
    expected = by_the_inverse(weight, hessian, scale, bits)
    # One weight whose rounding is a tie goes the other way in float32, and its row with it.
    rows = (values != expected).any(axis=1)
    assert rows.mean() <= 0.1
    assert error(weight, (values, scale), hessian) == pytest.approx(error(weight, (expected, scale), hessian), rel=0.01)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    columns=st.sampled_from([64, 128, 192]),
    samples=st.integers(8, 400),
    seed=st.integers(0, 10_000),
)
def test_less_error_than_rounding_to_nearest(bits: int, columns: int, samples: int, seed: int) -> None:
    """Also of fewer inputs than channels, where the Hessian has no inverse."""
    weight, hessian = problem(8, columns, samples, seed)
    block = 64 if bits == 4 else columns
    rounded = gptq(weight, hessian, bits, block)
    assert error(weight, rounded, hessian) < error(weight, quantize(weight, bits, block), hessian)
    assert (rounded[1] > 0).all()


def test_inputs_that_do_not_depend_on_each_other_give_rounding_to_nearest() -> None:
    weight, hessian = problem(16, 256, 1000)
    values, scale = gptq(weight, np.diag(np.diagonal(hessian)), 4, 64)
    assert np.array_equal(values, round_to(weight, scale, 4))


def test_channels_that_never_fire_are_rounded_to_nearest() -> None:
    weight, hessian = problem(8, 128, 1000)
    hessian[5], hessian[:, 5] = 0, 0
    values, scale = gptq(weight, hessian, 4, 64)
    assert np.array_equal(values[:, 5], round_to(weight, scale, 4)[:, 5])
    values, scale = gptq(weight, np.zeros_like(hessian), 4, 64)
    assert np.array_equal(values, round_to(weight, scale, 4))


def test_a_hessian_that_damping_cannot_mend_is_refused() -> None:
    weight, hessian = problem(4, 64, 1000)
    hessian[3, 4] = hessian[4, 3] = 1e12
    with pytest.raises(InputError, match="q_proj: Hessian: not positive semi-definite"):
        gptq(weight, hessian, 4, 64, name="q_proj")


def test_damping_is_raised_until_there_is_a_factor() -> None:
    weight, hessian = problem(4, 64, 1000)
    smallest = np.linalg.eigvalsh(hessian)[0]
    hessian -= np.eye(64, dtype=np.float32) * (smallest + 0.05 * np.diagonal(hessian).mean())
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(hessian + 0.01 * np.eye(64) * np.diagonal(hessian).mean())
    values, _ = gptq(weight, hessian, 4, 64)
    assert len(np.unique(values)) > 8


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    weight, hessian = problem(4, 64, 100)
    broken = hessian.copy()
    broken[3, 3] = bad
    with pytest.raises(InputError, match=r"q_proj: Hessian: holds NaN or infinity"):
        gptq(weight, broken, 4, 64, name="q_proj")
    weight[1, 2] = bad
    with pytest.raises(InputError, match=r"q_proj: holds NaN or infinity"):
        gptq(weight, hessian, 4, 64, name="q_proj")


def test_a_weight_too_large_for_a_scale_in_float16() -> None:
    weight, hessian = problem(4, 64, 100)
    weight[1, 2] = 1e7
    with pytest.raises(InputError, match="q_proj: a value is too large for a scale in float16"):
        gptq(weight, hessian, 4, 64, name="q_proj")


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight, hessian = problem(4, 96, 100)
    with pytest.raises(InputError, match="q_proj: blocks of 64 do not divide its input axis of 96"):
        gptq(weight, hessian, 4, 64, name="q_proj")
    with pytest.raises(InputError, match=r"q_proj: Hessian: expected shape \[96, 96\], found \[32, 32\]"):
        gptq(weight, hessian[:32, :32], 4, 32, name="q_proj")


def test_what_it_worked_on_is_let_go_of_at_once() -> None:
    weight, hessian = np.ones((64, 256), np.float32), np.eye(256, dtype=np.float32)
    gc.collect()
    gc.disable()
    try:
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(5):
            gptq(weight, hessian, 4, 64)
        assert tracemalloc.get_traced_memory()[0] - before < weight.nbytes
    finally:
        tracemalloc.stop()
        gc.enable()
