"""Cholesky factors in place are numpy's."""

import numpy as np
import pytest

from galerne.optimize.quantize.cholesky import factorize


@pytest.mark.parametrize("count", [1, 100, 512, 1100])
def test_the_factor_is_numpys(count: int) -> None:
    inputs = np.random.default_rng(0).standard_normal((count + 50, count)).astype(np.float32)
    matrix = inputs.T @ inputs / len(inputs) + 0.1 * np.eye(count, dtype=np.float32)
    expected = np.linalg.cholesky(matrix.astype(np.float64))
    found = np.tril(matrix) + np.triu(np.full_like(matrix, np.nan), 1)  # what is above the diagonal is not read
    factorize(found)
    assert np.abs(np.tril(found) - expected).max() < 1e-4


def test_a_matrix_without_a_factor_is_refused() -> None:
    matrix = np.eye(700, dtype=np.float32)
    matrix[650, 650] = -1
    with pytest.raises(np.linalg.LinAlgError):
        factorize(matrix)
