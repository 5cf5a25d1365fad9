"""Results come in order, errors at their turn, and nothing runs far ahead."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from galerne.parallel import ordered


def _slow_when_even(number: int) -> int:
    time.sleep(0.02 * (number % 2 == 0))
    return number


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_order_is_that_of_the_work(threads: int) -> None:
    assert list(ordered((partial(_slow_when_even, i) for i in range(20)), threads)) == list(range(20))


def test_work_is_spread() -> None:
    meet = threading.Barrier(3, timeout=30)
    assert len(list(ordered([meet.wait] * 3, 3))) == 3


def test_only_a_few_are_begun_before_their_turn() -> None:
    begun: list[int] = []

    def work() -> Iterator[Callable[[], int]]:
        for i in range(100):
            begun.append(i)
            yield partial(int, i)

    results = ordered(work(), 2)
    assert next(results) == 0
    assert len(begun) <= 5
    results.close()  # type: ignore[attr-defined]
    assert len(begun) <= 5


def test_an_error_comes_at_its_turn() -> None:
    results = ordered([partial(int, "1"), partial(int, "x"), partial(int, "3")], 2)
    assert next(results) == 1
    with pytest.raises(ValueError, match="'x'"):
        next(results)
    assert list(results) == []
