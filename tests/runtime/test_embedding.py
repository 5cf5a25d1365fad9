"""Ids, logits and caches in and out by DLPack and the buffer protocol: the same memory, and safe to hold on to."""

import array
import ctypes
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from galerne.errors import InputError
from galerne.runtime.bundle import Bundle
from galerne.runtime.ids import as_ids
from galerne.runtime.model import Model
from galerne.runtime.session import Session

Bundles = Callable[[str], Bundle]
IDS = [5, 0, 500, 7]


@pytest.fixture(scope="module")
def model(bundle_of: Bundles) -> Model:
    return Model.open(bundle_of("fp32").path)


def fed(model: Model, count: int) -> Session:
    session = model.session()
    session.append([token % 501 for token in range(count)])
    return session


def address(exporter: Any) -> int:
    return int(np.asarray(exporter).ctypes.data)


EXPORTERS: dict[str, Callable[[], Any]] = {
    "numpy int64": lambda: np.array(IDS, np.int64),
    "numpy int32": lambda: np.array(IDS, np.int32),
    "a stride": lambda: np.array([[token, 1] for token in IDS], np.int64)[:, 0],
    "torch int64": lambda: torch.tensor(IDS),
    "torch int32": lambda: torch.tensor(IDS, dtype=torch.int32),
    "array.array": lambda: array.array("i", IDS),
    "memoryview": lambda: memoryview(array.array("q", IDS)),
    "ctypes": lambda: (ctypes.c_int32 * 4)(*IDS),
    "read-only": lambda: memoryview(array.array("q", IDS)).toreadonly(),
}


@pytest.mark.parametrize("form", EXPORTERS)
def test_ids_are_read_where_they_lie(model: Model, form: str) -> None:
    exporter = EXPORTERS[form]()
    assert as_ids(exporter, "row 0", 501).ctypes.data == address(exporter)
    session, listed = model.session(), model.session()
    session.append(exporter)
    listed.append(IDS)
    assert np.array_equal(session.logits, listed.logits)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([1.0]), "found float64 of shape (1,)"),
        (np.array([[1, 2]]), "found int64 of shape (1, 2)"),
        (np.array([1], np.uint16), "found uint16"),
        (np.array([1], ">i4"), "found >i4"),
        (b"abc", "found uint8"),
        ([1.5], "found float64"),
        ([True], "found bool"),
        ([2**63], "found uint64"),
        ([2**70], "found object"),
        (["a"], "found <U1"),
        ([[1, 2], [3, 4]], "of shape (2, 2)"),
        (torch.tensor([1], dtype=torch.bfloat16), "expected token ids"),
        (torch.tensor([1], device="meta"), "expected token ids"),
        (np.array([3, 501]), "row 0, token 1: id 501 is not in the vocabulary of 501"),
        (np.array([3, -1], np.int32), "row 0, token 1: id -1 is not in the vocabulary of 501"),
        (7, "expected token ids"),
        (None, "expected token ids"),
        ("12", "expected token ids"),
        ([[1], [2, 3]], "expected token ids"),
    ],
)
def test_what_is_no_ids(model: Model, ids: Any, message: str) -> None:
    session = model.session()
    with pytest.raises(InputError) as caught:
        session.append(ids)
    assert message in str(caught.value)
    assert session.length == 0


def test_logits_are_one_memory_from_step_to_step(model: Model) -> None:
    """Across chunks of any size, growth of the ring, and its wrapping."""
    session = fed(model, 3)
    logits = session.logits
    assert logits.dtype == np.float32 and logits.shape == (501,) and logits.flags.c_contiguous
    for count in (1, 8, 5, 300, 1):
        session.append(list(range(count)))
        assert session.logits.ctypes.data == logits.ctypes.data
        assert np.array_equal(logits, session.logits)
    assert session.fork().logits.ctypes.data != logits.ctypes.data


def test_logits_go_out_without_a_copy(model: Model) -> None:
    session = fed(model, 20)
    where = session.logits.ctypes.data
    assert address(session.logits) == where
    assert address(np.from_dlpack(session.logits)) == where
    assert from_dlpack(session.logits).data_ptr() == where
    view = session.logits.data
    assert (view.format, view.shape, view.contiguous) == ("f", (501,), True)
    assert address(view) == where


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_cache_goes_out_without_a_copy(bundle_of: Bundles, precision: str) -> None:
    session = fed(Model.open(bundle_of(precision).path), 40)
    for ring in session.cache:
        assert ring.shape == (1, 2, 24, 32)
        assert from_dlpack(ring).data_ptr() == ring.ctypes.data == address(ring.data)
    # The memory that the engine writes: what is seen changes with the next step.
    tensor, before = from_dlpack(session.cache[0]), session.cache[0].copy()
    session.append([1])
    changed = (tensor.numpy() != before).any(axis=(0, 1, 3))
    assert np.flatnonzero(changed).tolist() == [40 % 24]


def test_a_view_outlives_growth_closing_and_its_session(model: Model) -> None:
    wide = fed(model, 5)
    rings = wide.cache
    held, logits = [from_dlpack(ring) for ring in rings], wide.logits.data
    copies, values = [ring.copy() for ring in rings], bytes(logits)
    wide._rows.cache.resize([rings[0].shape[2] + 8])
    assert wide.cache[0].shape[2] == rings[0].shape[2] + 8
    assert wide.cache[0].ctypes.data != rings[0].ctypes.data
    wide.append([1])  # goes to the new rings: the old ones are left as they were
    assert all(np.array_equal(tensor.numpy(), copy) for tensor, copy in zip(held, copies, strict=True))
    assert bytes(logits) != values
    values = bytes(logits)
    wide.close()
    del wide, rings
    gc.collect()
    for _ in range(20):
        fed(model, 50)  # takes memory that was given back
    assert all(np.array_equal(tensor.numpy(), copy) for tensor, copy in zip(held, copies, strict=True))
    assert bytes(logits) == values
