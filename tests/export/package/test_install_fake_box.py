"""install.sh against a root folder that looks like a Jetson's, with a stand-in for TensorRT: see fakes.py."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.export.package.fakes import Box

pytestmark = pytest.mark.skipif(os.name != "posix", reason="install.sh needs a POSIX shell")


def test_installs_and_a_second_run_changes_nothing(box: Box, unpacked: Path) -> None:
    done = box.install(unpacked)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "is in use" in done.stderr
    release = box.base / "current"
    record = json.loads((release / "bundle/engines/jetson-orin-nx-16gb/engine.json").read_text())
    assert record["backend_version"] == "10.3.0" and record["stack"] == "jetpack-6.2"
    assert (release / "bundle/engines/jetson-orin-nx-16gb/engine.plan").read_bytes() == b"made"
    assert (release / "site/nothing_at_all.py").is_file() and (release / "site/galerne/cli/main.py").is_file()
    assert "GALERNE_ENGINE=jetson-orin-nx-16gb\n" in (release / "galerne.env").read_text()
    unit = (box.root / "etc/systemd/system/galerne-tiny.service").read_text()
    assert "/opt/galerne/tiny/current/bin/galerne verify" in unit and "@NAME@" not in unit
    log = Path(box.environment["FAKE_LOG"])
    assert log.read_text().splitlines() == [
        "daemon-reload",
        "enable --quiet galerne-tiny.service",
        "restart galerne-tiny.service",
    ]
    before = box.tree()
    again = box.install(unpacked)
    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert box.tree() == before and len(log.read_text().splitlines()) == 3


def test_check_changes_nothing(box: Box, unpacked: Path) -> None:
    before = box.tree()
    done = box.install(unpacked, "--check")
    assert done.returncode == 0 and "the box is ready for tiny" in done.stderr
    assert box.tree() == before


def test_a_new_version_and_back(box: Box, unpacked: Path, newer: Path) -> None:
    assert box.install(unpacked).returncode == 0
    first = box.current
    assert box.install(newer).returncode == 0
    second = box.current
    assert first is not None and second is not None and first != second
    assert box.install(newer, "--rollback").returncode == 0
    assert box.current == first
    assert box.install(newer).returncode == 0
    assert box.current == second
    assert {path.name for path in (box.base / "releases").iterdir()} == {first, second}


def test_keep_one(box: Box, unpacked: Path, newer: Path) -> None:
    assert box.install(unpacked).returncode == 0
    assert box.install(newer, "--keep", "1").returncode == 0
    assert [path.name for path in (box.base / "releases").iterdir()] == [box.current]
    done = box.install(newer, "--rollback")
    assert done.returncode == 3 and "no version to go back to" in done.stderr


def test_an_engine_that_does_not_match_is_not_used(box: Box, unpacked: Path, newer: Path) -> None:
    assert box.install(unpacked).returncode == 0
    first, before = box.current, box.tree()
    done = box.install(newer, FAKE_ENGINE="wrong")
    assert done.returncode == 1
    assert f"the engine does not match its source; {first} is still in use" in done.stderr
    assert box.current == first
    assert {name for name in box.tree() if name not in before} == set()
    assert box.install(newer).returncode == 0 and box.current != first


def test_an_engine_that_is_not_built(box: Box, unpacked: Path) -> None:
    done = box.install(unpacked, FAKE_BUILD="fails")
    assert done.returncode == 3 and "the engine cannot be built here; nothing is still in use" in done.stderr
    assert box.current is None
    assert box.install(unpacked).returncode == 0


def test_a_service_that_does_not_start_is_rolled_back(box: Box, unpacked: Path, newer: Path) -> None:
    assert box.install(unpacked).returncode == 0
    first = box.current
    assert box.install(newer, "--root", str(box.root)).returncode == 0
    broken = f"releases/{box.current}"
    assert box.install(newer, "--rollback").returncode == 0
    (box.base / broken / ".complete").unlink()
    done = box.install(newer, FAKE_BROKEN=broken)
    assert done.returncode == 1 and f"{first} is in use again" in done.stderr
    assert box.current == first


def test_a_first_version_whose_service_does_not_start_is_not_in_use(box: Box, unpacked: Path, tmp_path: Path) -> None:
    other = Box.make(tmp_path / "other")
    assert other.install(unpacked).returncode == 0
    done = box.install(unpacked, FAKE_BROKEN=f"releases/{other.current}")
    assert done.returncode == 1 and box.current is None


KILLS = {
    "while files are copied": ["opt/galerne/tiny/releases/.*.partial/bundle"],
    "while wheels are unpacked": ["opt/galerne/tiny/releases/.*.partial/.finished-files"],
    "while the engine is built": ["opt/galerne/tiny/releases/.*.partial/bundle/engines/.*"],
    "after the engine was built": ["opt/galerne/tiny/releases/.*.partial/.finished-engine"],
    "after parity": ["opt/galerne/tiny/releases/.*.partial/.finished-parity"],
    "before the switch": ["opt/galerne/tiny/releases/*-tensorrt"],
    "at the switch": ["opt/galerne/tiny/.current.new", "opt/galerne/tiny/current"],
}


@pytest.mark.parametrize("point", KILLS)
def test_killed_and_run_again(box: Box, unpacked: Path, point: str) -> None:
    killed = box.killed(unpacked, KILLS[point], FAKE_BUILD_S="1" if "is built" in point else "0")
    assert killed or point in ("before the switch", "at the switch")  # a few milliseconds, which a run may win
    done = box.install(unpacked)
    assert done.returncode == 0, done.stderr
    assert (box.base / "current" / ".complete").exists()
    assert [path.name for path in (box.base / "releases").iterdir()] == [box.current]
    assert [path.name for path in (box.base / "current/bundle/engines").iterdir()] == ["jetson-orin-nx-16gb"]


def test_the_engine_is_not_built_twice(box: Box, unpacked: Path) -> None:
    assert box.killed(unpacked, KILLS["after the engine was built"])
    (engine,) = box.base.glob("releases/.*.partial/bundle/engines/*/engine.plan")
    made = engine.stat().st_ino
    assert box.install(unpacked, FAKE_BUILD="fails").returncode == 0
    assert next(box.base.glob("current/bundle/engines/*/engine.plan")).stat().st_ino == made


def test_two_at_once(box: Box, unpacked: Path) -> None:
    box.base.mkdir(parents=True)
    with subprocess.Popen(["flock", str(box.base / ".lock"), "sleep", "30"]) as holder:
        while not (box.base / ".lock").exists():
            pass
        done = box.install(unpacked)
        while "another install is running" not in done.stderr and box.current is None:
            done = box.install(unpacked)
        holder.kill()
    assert done.returncode == 3 and "another install is running" in done.stderr


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"FAKE_JETPACK": "5.1.2"}, "JetPack: expected 6.2, found 5.1.2"),
        ({"FAKE_TENSORRT_PACKAGE": "10.16.2.10-1"}, "TensorRT: expected 10.3, found 10.16.2.10-1"),
        ({"FAKE_TENSORRT_PACKAGE": ""}, "TensorRT: expected 10.3, found none"),
        ({"FAKE_MACHINE": "x86_64"}, "processor: expected aarch64, found x86_64"),
        ({"FAKE_FREE_KB": "1000"}, "disk: expected "),
    ],
)
def test_a_box_that_is_not_as_expected(box: Box, unpacked: Path, told: dict[str, str], says: str) -> None:
    before = box.tree()
    for options in (("--check",), ()):
        done = box.install(unpacked, *options, **told)
        assert done.returncode == 3 and says in done.stderr
    assert box.current is None
    assert {name for name in box.tree() if name not in before and not name.startswith("opt")} == set()


def test_too_little_memory(box: Box, unpacked: Path) -> None:
    (box.root / "proc/meminfo").write_text("MemAvailable: 100000 kB\n")
    done = box.install(unpacked)
    assert done.returncode == 3 and "MiB available, found 97; stop what uses it" in done.stderr
    assert box.install(unpacked, "--force").returncode == 0


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"FAKE_POWER": "2"}, "warning: power mode: expected 0 (MAXN_SUPER), found 2"),
        ({"FAKE_JETPACK": "6.1+b1"}, "warning: JetPack: expected 6.2, found 6.1+b1"),
        ({"FAKE_JETPACK": ""}, "nvidia-jetpack is not installed"),
    ],
)
def test_warnings(box: Box, unpacked: Path, told: dict[str, str], says: str) -> None:
    done = box.install(unpacked, "--check", **told)
    assert done.returncode == 0 and says in done.stderr


def test_no_jetson(box: Box, unpacked: Path) -> None:
    (box.root / "etc/nv_tegra_release").unlink()
    done = box.install(unpacked, "--check")
    assert done.returncode == 3 and "this is no Jetson" in done.stderr


def test_a_damaged_package(box: Box, unpacked: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(unpacked, tmp_path / "copy"))
    weights = bytearray((copy / "bundle/weights.bin").read_bytes())
    weights[1000] ^= 1
    (copy / "bundle/weights.bin").write_bytes(weights)
    done = box.install(copy)
    assert done.returncode == 2 and "bundle/weights.bin: FAILED" in done.stderr and box.current is None


@pytest.mark.parametrize("options", [("--nonsense",), ("--engine", "cpu"), ("--keep", "0"), ("--engine",)])
def test_bad_usage(box: Box, unpacked: Path, options: tuple[str, ...]) -> None:
    done = box.install(unpacked, *options)
    assert done.returncode == 2 and "install.sh: " in done.stderr


def test_a_disk_that_fills_up(box: Box, unpacked: Path, tmp_path: Path) -> None:
    """A file system of half a megabyte, and a df that says otherwise: another program may take the space meanwhile."""
    place = box.root / "opt"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(place)], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        done = box.install(unpacked, FAKE_FREE_KB="99999999")
        assert done.returncode == 3 and "free some space and run it again" in done.stderr
        assert box.current is None
        assert subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=False).returncode == 0
        assert box.install(unpacked).returncode == 0
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    script = Path(__file__).resolve().parents[3] / "export/package/box/install.sh"
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
