"""The wheels that a package carries: pinned ones from an index or a folder, and Galerne's own, made from what is installed."""

import base64
import hashlib
import io
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path

from galerne import __version__
from galerne.errors import BackendError, InputError
from galerne.files import sha256_file
from galerne.targets.target import Stack

_LOCKS = "galerne.export.package.locks"
_LAYERS = ("cli", "export", "optimize", "runtime", "targets")
_SUFFIXES = {".py", ".toml", ".json", ".txt", ".typed", ".sh", ".service"}
_LINE = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})")
# From Ubuntu 22.04's glibc down.
_PLATFORMS = ("manylinux_2_34", "manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # that a zip file can say


@dataclass(frozen=True)
class Pin:
    """One wheel: a package's name and version, and the file's hex SHA-256."""

    name: str
    version: str
    sha256: str


def lock_of(stack: Stack) -> str:
    """Return the text of the list for a stack. Raises: InputError if there is none for its Python and CUDA."""
    python, cuda = (stack.python or "").replace(".", ""), (stack.cuda or "").partition(".")[0]
    file = resources.files(_LOCKS) / f"cp{python}-cuda{cuda}.txt"
    if not file.is_file():
        there = ", ".join(sorted(item.name for item in resources.files(_LOCKS).iterdir() if item.name.endswith(".txt")))
        raise InputError(
            f"--stack {stack.name}: Python {stack.python} with CUDA {stack.cuda} has no list of wheels; there are: {there}"
        )
    return file.read_text("utf-8")


def read_lock(text: str) -> list[Pin]:
    """Return the wheels of a list. Raises: InputError on a line that does not pin version and hash."""
    pins = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            found = _LINE.fullmatch(line)
            if found is None:
                raise InputError(f"list of wheels: expected NAME==VERSION --hash=sha256:…, found {line!r}")
            pins.append(Pin(**found.groupdict()))
    return pins


def gather(lock: str, python: str, folder: Path) -> list[Path]:
    """Return the pinned wheels in a folder, after having pip download those that it lacks.

    Args:
        python: the box's version, such as "3.10".
        folder: an existing one; where it has them all, nothing is downloaded.
    Raises: BackendError if pip does not get them.
    """
    pins = read_lock(lock)
    found = _matching(pins, folder)
    if len(found) < len(pins):
        # The list goes to pip through a file beside the wheels, so that its own check of the hashes holds too.
        list_file = folder / ".wheels.txt"
        list_file.write_text(lock, encoding="utf-8")
        platforms = [word for name in _PLATFORMS for word in ("--platform", f"{name}_aarch64")]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [*platforms, "--python-version", python, "--implementation", "cp"]
        command += ["--require-hashes", "-r", str(list_file), "-d", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        list_file.unlink()
        found = _matching(pins, folder)
        missing = [f"{pin.name} {pin.version}" for pin in pins if pin not in found]
        if missing:
            why = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "pip left them out")
            raise BackendError(f"--wheels {folder}: lacks {', '.join(missing)}, and pip does not get them: {why}")
    return sorted(found.values())


def _matching(pins: list[Pin], folder: Path) -> dict[Pin, Path]:
    wanted = {pin.sha256: pin for pin in pins}
    hashes = {sha256_file(file): file for file in sorted(folder.glob("*.whl"))}
    return {wanted[sha256]: file for sha256, file in hashes.items() if sha256 in wanted}


def own_wheel() -> tuple[str, bytes]:
    """Make Galerne's wheel from the package as it is installed here; the same files give the same bytes.

    Returns: the file's name and its content.
    """
    files = {f"galerne/{name}": data for name, data in _files("galerne").items()}
    for layer in _LAYERS:
        files |= {f"galerne/{layer}/{name}": data for name, data in _files(f"galerne.{layer}").items()}
    info = f"galerne-{__version__}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: galerne\nVersion: {__version__}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: galerne\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_record_hash(data)},{len(data)}\n" for name, data in sorted(files.items()))
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # the package itself is compressed
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EARLIEST)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return f"galerne-{__version__}-py3-none-any.whl", buffer.getvalue()


def _files(package: str) -> dict[str, bytes]:
    spec = util.find_spec(package)
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    skipped = {"__pycache__", *(_LAYERS if package == "galerne" else ())}
    found = (path for path in root.rglob("*") if path.suffix in _SUFFIXES)
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in found
        if not skipped.intersection(path.relative_to(root).parts[:-1])
    }


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
