"""Runs one command in a process of its own and says what it took."""

import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from galerne.errors import BackendError

Read = TypeVar("Read")
ROOT = Path(__file__).resolve().parents[1]
QUIET_CORES = 0.1  # what others may keep busy on a machine that counts as quiet
_QUIET_S = 2.0
_SAMPLE_S = 0.05
_STAT = Path("/proc/stat")
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Finished:
    """A process that ended well.

    stdout: all that it wrote there.
    seconds: from its start to its end. cpu_seconds: of its own work, on all cores together.
    peak_rss_bytes: its largest resident set, `ru_maxrss`; pages of mapped files that it touched count.
    peak_anon_bytes: the largest part of it that the system cannot drop, `RssAnon`, looked at 20 times a second; null where
        /proc does not say.
    other_cores: how many cores everything else kept busy meanwhile; null where /proc/stat does not say.
    """

    stdout: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anon_bytes: int | None
    other_cores: float | None


def run(command: Sequence[str | Path], *, cwd: Path = ROOT) -> Finished:
    """Run a command to its end.

    Linux hands the caller's own `ru_maxrss` on to the child, so the caller must stay small: it never loads a model.

    Raises: BackendError with the last line of its stderr, if its status is not 0.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        arguments = [str(part) for part in command]
        busy, start = busy_seconds(), time.perf_counter()
        process = subprocess.Popen(arguments, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        with _Sampler(process.pid) as sampler:
            _, status, usage = os.wait4(process.pid, 0)
        seconds, ended = time.perf_counter() - start, busy_seconds()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            last = err.read().strip().rsplit("\n", 1)[-1]
            raise BackendError(f"{shlex.join(arguments)}: ended with status {process.returncode}: {last}")
        others = None
        if busy is not None and ended is not None:
            others = max(0.0, ended - busy - usage.ru_utime - usage.ru_stime) / seconds
        return Finished(
            out.read(),
            seconds,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss * _MAXRSS_UNIT,
            sampler.peak_bytes,
            others,
        )


def stream(command: Sequence[str | Path], read: Callable[[BinaryIO], Read]) -> tuple[Read, str]:
    """Run a command that writes much, and read that as it comes, so that none of it lies on a disk.

    Args:
        command: gets one more argument, the path that it writes to.
        read: is given the pipe, and reads it to its end.
    Returns: what `read` did, and the command's stdout.
    Raises: BackendError with the last line of its stderr, if its status is not 0.
    """
    end, begin = os.pipe()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        arguments = [*map(str, command), f"/dev/fd/{begin}"]
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, pass_fds=[begin]
        )
        os.close(begin)  # so that the pipe ends when the command does
        with open(end, "rb") as pipe:
            found = read(pipe)
        status = process.wait()
        out.seek(0)
        err.seek(0)
        if status != 0:
            last = err.read().strip().rsplit("\n", 1)[-1]
            raise BackendError(f"{shlex.join(arguments)}: ended with status {status}: {last}")
        return found, out.read()


class _Sampler:
    """Watches a process's anonymous memory on a thread of its own.

    peak_bytes: the most that was seen.
    """

    def __init__(self, pid: int) -> None:
        self.peak_bytes: int | None = None
        self._status, self._over = Path(f"/proc/{pid}/status"), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:  # ended, or a system without /proc
                return
            for line in lines:
                if line.startswith("RssAnon:"):
                    self.peak_bytes = max(self.peak_bytes or 0, int(line.split()[1]) * 1024)


def busy_seconds() -> float | None:
    """Return the seconds of work that all cores together have done since the start, or None where /proc/stat is not there."""
    if not _STAT.is_file():
        return None
    user, nice, system, _, _, irq, soft_irq, *_ = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")


def run_quietly(command: Sequence[str | Path], patience_s: float) -> Finished:
    """Wait for a quiet machine and run a command, again while others disturb it; after `patience_s` seconds take what comes.

    What decides is how busy others were, never how long the command took. Raises: BackendError as `run` does.
    """
    deadline = time.monotonic() + patience_s
    while True:
        _wait_until_quiet(deadline)
        finished = run(command)
        if (finished.other_cores or 0.0) <= QUIET_CORES or time.monotonic() >= deadline:
            return finished


def _wait_until_quiet(deadline: float) -> None:
    while time.monotonic() < deadline:
        before = busy_seconds()
        if before is None:
            return
        time.sleep(_QUIET_S)
        if ((busy_seconds() or 0.0) - before) / _QUIET_S <= QUIET_CORES:
            return
