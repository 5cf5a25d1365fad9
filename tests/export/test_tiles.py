"""The tiles' steps against numpy's plain ones."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galerne.export.tiles import is_finite, narrow, pack_rows, transpose_into, widen
from galerne.optimize.quantize.rounding import pack_int4

ALL_BFLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)


def test_every_bfloat16_narrows_as_numpy_casts_it() -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = ALL_BFLOAT16.astype(np.float32).astype(np.float16)
    assert np.array_equal(narrow(ALL_BFLOAT16, np.dtype(np.float16)), wanted, equal_nan=True)
    assert np.array_equal(widen(ALL_BFLOAT16), ALL_BFLOAT16.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_narrowing(source: Any, dtype: Any) -> None:
    values = (np.random.default_rng(0).standard_normal((50, 30)) * 10).astype(np.float32).astype(source)
    found = narrow(values[:, 3:20], np.dtype(dtype))
    assert found.dtype == dtype
    assert np.array_equal(found, values[:, 3:20].astype(np.float32).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_shows(dtype: Any, value: float) -> None:
    values = np.full((5, 7), np.finfo(np.float16).max, np.float32).astype(dtype)
    assert is_finite(values) and is_finite(-values[:, 1:3]) and is_finite(values[:0])
    values[3, 2] = value
    assert not is_finite(values) and not is_finite(values[:, 1:3])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.sampled_from([np.int8, np.uint8, np.float16, np.float32]))
def test_transposing(rows: int, columns: int, dtype: Any) -> None:
    tile = np.random.default_rng(rows).integers(0, 120, (rows, columns)).astype(dtype)
    out = np.zeros((columns, rows + 8), dtype)
    transpose_into(out[:, 8:], tile)
    assert np.array_equal(out[:, 8:], tile.T) and not out[:, :8].any()


def test_packing_rows_is_packing_what_they_become() -> None:
    values = np.random.default_rng(0).integers(-8, 8, (32, 11)).astype(np.int8)
    out = np.empty((11, 16), np.uint8)
    transpose_into(out, pack_rows(values))
    assert np.array_equal(out.reshape(-1), pack_int4(np.ascontiguousarray(values.T)))
