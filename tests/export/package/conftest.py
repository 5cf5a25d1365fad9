"""Packages of the shared checkpoint for a box whose Python is this one's, each unpacked once."""

import dataclasses
import hashlib
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.package.package import package
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.targets.target import Stack, Target, load
from tests.export.package.fakes import Box

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(scope="session")
def orin() -> Target:
    return load("jetson-orin-nx-16gb")


@pytest.fixture(scope="session")
def jetpack6(orin: Target) -> Stack:
    """JetPack 6.2, but for its Python: here it is the one that runs the tests."""
    return dataclasses.replace(orin.stack("jetpack-6.2"), python=PYTHON)


@pytest.fixture(scope="session")
def primitive(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shared checkpoint in the primitive dialect at fp16, with a passing verdict that nobody looked into."""
    out = tmp_path_factory.mktemp("primitive") / "tiny"
    made = export(open_checkpoint(checkpoint_folder), recipe.load("fp16"), out, chunk=8, dialect="primitive")
    return made.with_verdict("portable", b"{}\n", passed=True)


@pytest.fixture(scope="session")
def one_wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A list of one small wheel, and the folder that has it: the fake box takes the others from here."""
    folder = tmp_path_factory.mktemp("wheels")
    file = folder / "nothing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("nothing_at_all.py", "")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return f"nothing==1.0 --hash=sha256:{digest}\n", folder


@pytest.fixture(scope="session")
def packed(
    checkpoint_folder: Path,
    primitive: Bundle,
    orin: Target,
    jetpack6: Stack,
    one_wheel: tuple[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The package as a file."""
    out = tmp_path_factory.mktemp("packed") / "box.tar"
    lock, wheels = one_wheel
    package(primitive, open_checkpoint(checkpoint_folder), orin, jetpack6, out, lock=lock, wheels=wheels)
    return out


@pytest.fixture(scope="session")
def unpacked(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's folder; tests must not change it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / "tiny-jetson-orin-nx-16gb"


@pytest.fixture(scope="session")
def newer(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another version of the same package: one more wheel's line in its list."""
    folder = Path(shutil.copytree(unpacked, tmp_path_factory.mktemp("newer") / "package"))
    (folder / "wheels.txt").write_text("# newer\n" + (folder / "wheels.txt").read_text())
    sums = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}"
        for name in (line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    ]
    (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    return folder


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box.make(tmp_path)
