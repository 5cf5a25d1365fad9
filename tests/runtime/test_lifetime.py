"""Memory over time: models opened and closed, long sessions, and arrays that outlive what they came from."""

import gc
import mmap
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import psutil
import pytest

from galerne.errors import BackendError
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines import ort
from galerne.runtime.model import Model

Bundles = Callable[[str], Bundle]


def rss() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def open_and_close(bundle: Bundle) -> None:
    """Open a model, use it in every way that takes memory, close it."""
    with Model.open(bundle.path, threads=2) as model:
        session = model.session()
        session.append(list(range(30)))
        session.fork().append([1])
        session.append([1])


def grows(bundle: Bundle, cycles: int) -> float:
    """Return by which share the memory grows over `cycles`, after a quarter as many to warm up."""
    for _ in range(cycles // 4):
        open_and_close(bundle)
    before = rss()
    for _ in range(cycles):
        open_and_close(bundle)
    return rss() / before - 1


def test_models_that_are_closed_leave_nothing(bundle_of: Bundles) -> None:
    assert grows(bundle_of("fp32"), 100) < 0.01


@pytest.mark.slow
def test_a_thousand_models_leave_nothing(bundle_of: Bundles) -> None:
    assert grows(bundle_of("fp32"), 1000) < 0.01


def test_close_releases_memory_though_model_and_session_are_held(heavy_bundle: Bundle) -> None:
    held: list[object] = []

    def growth(count: int, *, close: bool) -> float:
        before = rss()
        for _ in range(count):
            model = Model.open(heavy_bundle.path, threads=1)
            session = model.session()
            session.append([1] * 200)
            if close:
                model.close()
            held.append((model, session))
        return (rss() - before) / count

    growth(10, close=True)  # warm up
    closed, opened = growth(10, close=True), growth(10, close=False)
    assert opened > 10e6
    assert closed < 2e6


def test_memory_of_sessions_goes_with_them(bundle_of: Bundles) -> None:
    """Without `close` too, as soon as nobody holds them; forks and cancelled ones likewise."""
    model = Model.open(bundle_of("fp32").path)
    session = model.session()
    session.append(list(range(100)))
    for _ in range(50):
        session.fork()
    before = rss()
    for _ in range(300):
        session.fork().append([1, 2])
        model.session().append([1])
    assert rss() - before < 2e6


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
def test_rings_that_could_not_grow_are_as_before(
    bundle_of: Bundles, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    session = Model.open(bundle_of("fp32").path).session()
    session.append(list(range(10)))
    twin, rings = session.fork(), [ring.copy() for ring in session.cache]
    made, resized = [], ort._resized

    def fails_at_the_third(old: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        made.append(shape)
        if len(made) == 3:
            raise failure
        return resized(old, shape)

    monkeypatch.setattr(ort, "_resized", fails_at_the_third)
    with pytest.raises(failure):
        session._rows.cache.resize([rings[0].shape[2] + 8])
    assert len(made) == 5  # two had grown, and went back
    assert all(np.array_equal(ring, before) for ring, before in zip(session.cache, rings, strict=True))
    for each in (session, twin):
        each.append([7])
    assert np.array_equal(session.logits, twin.logits)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs a system other than Windows")
def test_rings_that_no_memory_holds_are_one_line(bundle_of: Bundles) -> None:
    session = Model.open(bundle_of("fp32").path).session()
    session.append([1, 2, 3])
    before = session.logits.copy()
    with pytest.raises(
        BackendError, match=r"no memory for keys and values: \d+ bytes for a ring of 1x2x1099511627776x32"
    ):
        session._rows.cache.resize([1 << 40])
    session.rewind(1)
    session.append([3])
    assert np.allclose(session.logits, before, atol=1e-4)


@pytest.mark.slow
def test_memory_is_flat_over_a_hundred_thousand_tokens(bundle_of: Bundles) -> None:
    model = Model.open(bundle_of("fp32").path, threads=1)
    session, token, seen = model.session(), np.zeros(1, np.int64), []
    session.append(list(range(50)))
    while session.length < 100_000:
        token[0] = session.logits.argmax()
        session.append(token)
        if session.length % 10_000 == 0:
            seen.append(rss())
    assert max(seen[1:]) - seen[0] < 1e6


FORKED = """
import gc, os, sys
from pathlib import Path
from galerne.errors import InputError
from galerne.runtime.model import Model

model = Model.open(Path(sys.argv[1]), threads=4)
session = model.session()
session.append([1, 2, 3])
child = os.fork()
if child == 0:
    for use in (lambda: session.append([4]), model.session, session.fork):
        try:
            use()
        except InputError as exc:
            print(exc, flush=True)
    expected = session.logits.copy()
    del use, session, model  # letting go of the parent's neither hangs nor crashes
    gc.collect()
    with Model.open(Path(sys.argv[1]), threads=4) as own:  # its own one works
        mine = own.session()
        mine.append([1, 2, 3])
        print((mine.logits == expected).all(), flush=True)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
session.append([4])
print(session.length)
"""


def test_a_forked_child_is_told_to_open_its_own(bundle_of: Bundles) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(bundle_of("fp32").path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    *refused, same, status, length = done.stdout.splitlines()
    assert len(refused) == 3
    assert all("forked child" in line and "open it in the child" in line for line in refused)
    assert (same, status, length) == ("True", "7", "4")


INTERRUPTED = """
import signal, sys, threading, time
from pathlib import Path
import numpy as np
from galerne.runtime.model import Model

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
model = Model.open(Path(sys.argv[1]), threads=1)
prompt = np.arange(30_000) % 501
session = model.session()

def interrupt():
    while not session.length:
        time.sleep(0.001)
    signal.raise_signal(signal.SIGINT)

thread = threading.Thread(target=interrupt)
thread.start()
try:
    while thread.is_alive() or session.length < 100 * len(prompt):  # a busy machine may take its time to interrupt
        session.append(prompt)
    print("not interrupted")
except KeyboardInterrupt:
    thread.join()
    done = session.length
    text = np.tile(prompt, 2 + done // len(prompt))[: done + 50]
    session.append(text[done:])
    fresh = model.session()
    fresh.append(text)
    print(done > 0, np.allclose(session.logits, fresh.logits, atol=1e-4))
"""


def test_ctrl_c_ends_a_prompt_between_chunks_and_leaves_the_session_usable(bundle_of: Bundles) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(bundle_of("fp32").path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]
