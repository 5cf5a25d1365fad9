"""An export that is killed leaves nothing at its destination, and the next one succeeds and clears up."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Whole = tuple[float, dict[str, bytes]]


@pytest.fixture(scope="module")
def whole(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An export that was let be: how long it took in seconds, and its files."""
    out = tmp_path_factory.mktemp("whole") / "bundle"
    start = time.perf_counter()
    assert _start(checkpoint_folder, out).wait() == 0
    return time.perf_counter() - start, {file.name: file.read_bytes() for file in out.iterdir()}


def _start(checkpoint: Path, out: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "galerne.cli", "export", str(checkpoint), "--out", str(out), "--precision", "int4"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _staged(out: Path, file: str) -> Callable[[], None]:
    """Wait until a file shows in the staging folder."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while not list(out.parent.glob(f".{out.name}.*/{file}")) and time.monotonic() < deadline:
            time.sleep(0.001)

    return wait


def _kill(checkpoint: Path, whole: Whole, out: Path, after: Callable[[], None]) -> None:
    with _start(checkpoint, out) as process:
        after()
        process.kill()
    if not out.exists():  # else it was too late, and the bundle must be whole
        assert _start(checkpoint, out).wait() == 0
    assert os.listdir(out.parent) == [out.name]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == whole[1]


@pytest.mark.parametrize("moment", [".", "weights.bin"])
def test_killed(checkpoint_folder: Path, whole: Whole, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "bundle"
    _kill(checkpoint_folder, whole, out, _staged(out, moment))


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(20))
def test_killed_at_many_moments(checkpoint_folder: Path, whole: Whole, tmp_path: Path, turn: int) -> None:
    pause = random.Random(turn).uniform(0.3, 1.05) * whole[0]
    _kill(checkpoint_folder, whole, tmp_path / "bundle", lambda: time.sleep(pause))
