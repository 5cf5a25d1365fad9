"""Factors by input channel: AWQ's against the outputs they are for, SmoothQuant's against their definition."""

import numpy as np
import pytest

from galerne.errors import InputError
from galerne.optimize.quantize.awq import awq_factors
from galerne.optimize.quantize.rounding import dequantize, quantize
from galerne.optimize.quantize.smooth import smooth_factors


@pytest.fixture
def inputs() -> np.ndarray:
    """Return inputs [n, in] of which a few channels are much larger than the rest, as in a language model."""
    rng = np.random.default_rng(0)
    sizes = np.ones(128, np.float32)
    sizes[[3, 70, 90]] = [30, 60, 20]
    return (rng.standard_normal((256, 128)) * sizes).astype(np.float32)


@pytest.fixture
def weights() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((rows, 128)) * 0.02).astype(np.float32) for rows in (64, 32)]


def output_error(weights: list[np.ndarray], factors: np.ndarray, inputs: np.ndarray) -> float:
    """Return the squared error of the products as they run: the input divided, the weight multiplied and rounded."""
    rounded = [dequantize(*quantize(weight * factors, 4, 64)) for weight in weights]
    return sum(
        float(np.square((inputs / factors) @ new.T - inputs @ weight.T).sum())
        for weight, new in zip(weights, rounded, strict=True)
    )


def test_awq_halves_the_error_where_few_channels_matter(weights: list[np.ndarray], inputs: np.ndarray) -> None:
    factors = awq_factors(weights, inputs, 4, 64)
    assert output_error(weights, factors, inputs) < 0.5 * output_error(weights, np.ones_like(factors), inputs)
    assert factors[70] > factors[3] > factors[90] > np.median(factors)
    assert (factors > 0).all() and np.sqrt(factors.max() * factors.min()) == pytest.approx(1, rel=1e-5)


def test_awq_leaves_inputs_of_one_size_alone(weights: list[np.ndarray]) -> None:
    ones = np.sign(np.random.default_rng(0).standard_normal((256, 128))).astype(np.float32)
    assert np.array_equal(awq_factors(weights, ones, 4, 64), np.ones(128, np.float32))


def test_awq_of_an_input_that_is_always_zero(weights: list[np.ndarray], inputs: np.ndarray) -> None:
    inputs[:, 5] = 0
    factors = awq_factors(weights, inputs, 4, 64)
    assert np.isfinite(factors).all() and (factors > 0).all()
    assert np.array_equal(awq_factors(weights, np.zeros_like(inputs), 4, 64), np.ones(128, np.float32))


def test_awq_names_what_is_not_finite_or_does_not_divide(weights: list[np.ndarray], inputs: np.ndarray) -> None:
    with pytest.raises(InputError, match="q_proj: blocks of 48 do not divide its input axis of 128"):
        awq_factors(weights, inputs, 4, 48, name="q_proj")
    weights[1][2, 3] = np.nan
    with pytest.raises(InputError, match="q_proj: holds NaN or infinity"):
        awq_factors(weights, inputs, 4, 64, name="q_proj")
    inputs[0, 0] = np.inf
    with pytest.raises(InputError, match="q_proj: inputs: holds NaN or infinity"):
        awq_factors(weights, inputs, 4, 64, name="q_proj")


def test_smoothing_halfway_gives_input_and_weights_the_same_range(
    weights: list[np.ndarray], inputs: np.ndarray
) -> None:
    absmax = np.abs(inputs).max(axis=0)
    factors = smooth_factors(weights, absmax, 0.5)
    scaled = np.abs(np.concatenate(weights) * factors).max(axis=0)
    assert np.allclose(absmax / factors, scaled, rtol=1e-5)


def test_smoothing_by_0_and_by_1(weights: list[np.ndarray], inputs: np.ndarray) -> None:
    """All of the input's range, or all of the weights', goes over: the other side is left with 1 everywhere."""
    absmax, together = np.abs(inputs).max(axis=0), np.concatenate(weights)
    assert np.allclose(absmax / smooth_factors(weights, absmax, 1.0), 1)
    assert np.allclose(np.abs(together * smooth_factors(weights, absmax, 0.0)).max(axis=0), 1)


def test_smoothing_leaves_dead_channels_alone(weights: list[np.ndarray], inputs: np.ndarray) -> None:
    absmax = np.abs(inputs).max(axis=0)
    absmax[5] = 0
    for weight in weights:
        weight[:, 9] = 0
    factors = smooth_factors(weights, absmax, 0.5)
    assert factors[5] == factors[9] == 1 and np.isfinite(factors).all()
