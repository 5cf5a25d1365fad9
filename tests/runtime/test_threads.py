"""Many threads on one model, one thread too many on a session, cancelling, and a GIL that stays free."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from galerne.errors import BusyError, Cancelled
from galerne.runtime.bundle import Bundle
from galerne.runtime.model import Model
from galerne.runtime.session import Session

Bundles = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def model(bundle_of: Bundles) -> Model:
    return Model.open(bundle_of("fp32").path, threads=1)


@pytest.fixture(scope="module")
def heavy(heavy_bundle: Bundle) -> Model:
    return Model.open(heavy_bundle.path, threads=1)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 501, count)]


def greedy(model: Model, seed: int) -> list[int]:
    """Prompts of many lengths, so that the threads' runs differ in shape and grow their rings at different times."""
    session, ids = model.session(), []
    session.append(tokens(3 + 17 * seed, seed))
    for _ in range(120):
        ids.append(int(session.logits.argmax()))
        session.append(ids[-1:])
    return ids


@pytest.mark.parametrize("precision", ["fp32", "int4-rtn"])
def test_eight_threads_give_the_tokens_of_one(bundle_of: Bundles, precision: str) -> None:
    with Model.open(bundle_of(precision).path) as model:
        alone = [greedy(model, seed) for seed in range(8)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda seed: greedy(model, seed), range(8))) == alone


def _running(session: Session, ids: list[int]) -> tuple[threading.Thread, list[Exception]]:
    """Append in another thread; return when it has begun."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            session.append(ids)
        except Cancelled as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 60
    while session.length == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert session.length > 0
    return thread, raised


def test_a_second_thread_is_told_that_the_session_is_busy(model: Model, tmp_path: Path) -> None:
    session, prompt = model.session(), tokens(20_000)
    thread, raised = _running(session, prompt)
    uses: list[Callable[[], object]] = [
        lambda: session.append([1]),
        lambda: session.rewind(1),
        lambda: session.save(tmp_path / "session"),
        session.fork,
        session.close,
        lambda: session.logits,
        lambda: session.cache,
    ]
    for use in uses:
        with pytest.raises(BusyError, match="another thread is using it"):
            use()
    session.cancel()
    thread.join()
    assert len(raised) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_use_is_not_closed(bundle_of: Bundles) -> None:
    model = Model.open(bundle_of("fp32").path)
    session, idle = model.session(), model.session()
    thread, raised = _running(session, tokens(20_000))
    with pytest.raises(BusyError):
        model.close()
    idle.append([1])
    session.cancel()
    thread.join()
    assert len(raised) == 1
    model.close()


def test_cancelled_between_chunks_and_as_good_as_before(model: Model) -> None:
    session, prompt = model.session(), tokens(20_000)
    thread, raised = _running(session, prompt)
    session.cancel()
    thread.join()
    done = session.length
    assert 0 < done < len(prompt)
    assert str(raised[0]) == f"cancelled: {done} of 20000 new tokens were fed"
    fresh = model.session()
    fresh.append(prompt[:done])
    assert np.array_equal(session.logits, fresh.logits)
    session.append(prompt[done : done + 9])
    fresh.append(prompt[done : done + 9])
    assert np.allclose(session.logits, fresh.logits, atol=1e-5)


def test_cancelled_between_tokens(model: Model) -> None:
    session, ids = model.session(), tokens(1)
    session.append(ids)
    canceller = threading.Timer(0.05, session.cancel)
    canceller.start()
    with pytest.raises(Cancelled, match="cancelled: 0 of 1 new tokens were fed"):
        while True:
            session.append([int(session.logits.argmax())])
    canceller.join()
    session.append([1])  # once only


def test_the_gil_is_free_during_a_run(heavy: Model) -> None:
    """Another thread of the process goes on while one run, which nothing can interrupt, takes its time."""
    beats: list[float] = []
    stop = threading.Event()

    def beat() -> None:
        while not stop.is_set():
            beats.append(time.perf_counter())
            time.sleep(0.001)

    heavy.session().append(tokens(2048))  # the first run prepares shapes
    session = heavy.session()
    session.append([1])
    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.02)
    # The machine may take the thread's turn away for a while; the GIL would be held at every try.
    tries = []
    for seed in range(5):
        start = time.perf_counter()
        session.append(tokens(2048 - 1, seed))
        end = time.perf_counter()
        inside = [start, *(at for at in beats if start < at < end), end]
        tries.append((float(np.diff(inside).max()), end - start))
    stop.set()
    thread.join()
    gap, run = min(tries)
    assert run > 0.1, "the run is too short to tell"
    assert gap < 0.05, f"no beat for {gap:.3f} s of a run of {run:.3f} s"
