"""Brings a package onto a box over rsync, goes on where a transfer broke off, and runs its install.sh there over ssh."""

import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from galerne.errors import BackendError, CheckFailed, GalerneError, InputError
from galerne.export.package.archive import SUFFIXES
from galerne.files import sha256_file
from galerne.progress import say

# A name goes to ssh and rsync as an argument and to no shell; what may stand in it is limited all the same.
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*")
# rsync's own numbers for a connection that broke or timed out, and ssh's.
_BROKEN = {10, 12, 30, 35, 255}
_TRIES = 5
_RSYNC = ["rsync", "--partial", "--append-verify"]
_ZSTD = "zstd is not installed: apt-get install zstd, or name the package .tar"
_FOLDER = ".cache/galerne"  # in the home of whoever logs in
_ERRORS: dict[int, type[GalerneError]] = {1: CheckFailed, 2: InputError}


@dataclass(frozen=True)
class Deployment:
    """What is to be done.

    options: for install.sh.
    """

    file: Path
    host: str
    port: int = 22
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.host):
            raise InputError(f"HOST: expected a name as in box or user@box.example.net, found {self.host!r}")
        if not self.file.is_file() or not self.file.name.endswith(SUFFIXES):
            raise InputError(f"{self.file}: expected a package that `galerne package` wrote")

    def commands(self) -> list[list[str]]:
        """Return what is run, in order: make a folder there, bring the file, install."""
        suffix = next(suffix for suffix in SUFFIXES if self.file.name.endswith(suffix))
        # Named after its content, so that no part of another package is taken for the beginning of this one.
        name = sha256_file(self.file)[:16]
        ssh = ["ssh", "-p", str(self.port), "-o", "BatchMode=yes"]
        place = f"{_FOLDER}/{name}{suffix}"
        return [
            [*ssh, "--", self.host, f"mkdir -p {_FOLDER}"],
            [*_RSYNC, "-e", shlex.join(ssh), "--", str(self.file.absolute()), f"{self.host}:{place}"],
            [*ssh, "--", self.host, _script(place, f"{_FOLDER}/{name}", self.options)],
        ]

    def run(self) -> None:
        """Do it.

        Raises: CheckFailed, InputError or BackendError with install.sh's own line, by its exit status; BackendError if ssh or
            rsync is missing or the box is not reached.
        """
        make, bring, install = self.commands()
        _checked(make, self.host)
        for attempt in range(1, _TRIES + 1):
            say(f"copy {self.file.name} to {self.host} …")
            status, line = _run(bring)
            if status == 0:
                break
            if status not in _BROKEN or attempt == _TRIES:
                raise BackendError(
                    f"{self.host}: rsync failed with status {status}: {line}; run it again to go on from there"
                )
            say(f"the transfer broke off ({line}); going on from there")
            time.sleep(attempt)
        _checked(install, self.host)


def _script(place: str, folder: str, options: tuple[str, ...]) -> str:
    """Return what the box's shell runs. It is made of our own words and of options that are quoted."""
    steps = [
        "set -e",
        f"rm -rf {folder}",
        f"mkdir -p {folder}",
        f"tar -xf {place} -C {folder}",
        f"cd {folder}/*/",
        'root=""; [ "$(id -u)" = 0 ] || root="sudo -n"',
        f"$root ./install.sh {shlex.join(options)}",
        f"cd; rm -rf {folder} {place}",
    ]
    if place.endswith(".zst"):
        need = f'command -v zstd >/dev/null || {{ echo "{_ZSTD}" >&2; exit 3; }}'
        steps.insert(1, need)
    return "\n".join(steps)


def _checked(command: list[str], host: str) -> None:
    status, line = _run(command)
    if status == 255:
        raise BackendError(f"{host}: cannot be reached over ssh: {line}")
    if status:
        raise _ERRORS.get(status, BackendError)(f"{host}: {line}")


def _run(command: list[str]) -> tuple[int, str]:
    """Run a command, passing on what it says. Returns: its status, and its last line on stderr."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError as exc:
        raise BackendError(f"{command[0]} is not installed; install it") from exc
    line = "no reason given"
    assert process.stderr is not None
    with process:
        for text in process.stderr:
            if text.strip():
                line = text.strip()
                say(line)
    return process.returncode, line
