"""The package on the architecture that it is for: aarch64 under qemu-user, with the real wheels and the real install.sh.

The folder that it runs in comes from `make arm64-root`. Its Python is Debian's 3.11, where JetPack 6 has 3.10; ONNX Runtime and
numpy are of the versions that the package for JetPack 6.2 carries. There is no GPU in it, so the engine is the portable graph.
"""

import dataclasses
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from galerne.errors import BackendError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.package.package import package
from galerne.optimize.quantize import recipe
from galerne.runtime.generate import Generation
from galerne.runtime.model import Model
from galerne.targets.target import Target
from tests.export.package.fakes import Box

ROOT = Path(__file__).resolve().parents[3]
ARM = ROOT / "build" / "arm64-root"
QEMU = shutil.which("qemu-aarch64-static")
TINY = ROOT / "examples" / "tiny-mistral"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(QEMU is None, reason="qemu-aarch64-static is not installed: apt-get install qemu-user-static"),
    pytest.mark.skipif(not (ARM / ".complete").exists(), reason="build/arm64-root is not there: make arm64-root"),
]


@pytest.fixture(scope="module")
def unpacked(orin: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package of examples/tiny-mistral at int4 with wheels for aarch64, unpacked."""
    folder = tmp_path_factory.mktemp("qemu")
    wheels = ROOT / "build" / "wheels-cp311"
    wheels.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(TINY)
    made = export(checkpoint, recipe.load("int4-rtn"), folder / "tiny", chunk=256, dialect="primitive")
    made = made.with_verdict("portable", b"{}\n", passed=True)
    stack = dataclasses.replace(orin.stack("jetpack-6.2"), python="3.11")
    out, lock = folder / "box.tar", (Path(__file__).parent / "cp311.txt").read_text()
    try:
        package(made, checkpoint, orin, stack, out, wheels=wheels, lock=lock)
    except BackendError as exc:
        pytest.skip(str(exc))
    with tarfile.open(out) as archive:
        archive.extractall(folder, filter="data")
    yield folder / "tiny-jetson-orin-nx-16gb"
    shutil.rmtree(folder)


def test_installs_verifies_and_generates_on_aarch64(unpacked: Path, tmp_path: Path) -> None:
    box = Box.make(tmp_path)
    wrapper = tmp_path / "python3"
    # Without the box's own processor in sight ONNX Runtime would look at this machine's.
    command = f"{QEMU} -cpu cortex-a76 -L {ARM} {ARM}/usr/bin/python3.11"
    wrapper.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    wrapper.chmod(0o755)
    box.environment["GALERNE_PYTHON"] = str(wrapper)
    done = box.install(unpacked, "--engine", "portable", "--force")
    assert done.returncode == 0, done.stderr
    assert box.current is not None and box.current.endswith("-portable")

    def on_box(*arguments: str) -> "subprocess.CompletedProcess[str]":
        run = [str(wrapper), "-s", str(box.base / "current/bin/galerne"), *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=False, timeout=600)

    bundle = str(box.base / "current/bundle")
    machine = subprocess.run(
        [str(wrapper), "-c", "import platform; print(platform.machine())"], capture_output=True, text=True
    )
    assert machine.stdout.strip() == "aarch64"
    recorded = str(box.base / "current/parity/recorded.safetensors")
    replayed = on_box("verify", bundle, "--recorded", recorded, "--json")
    assert replayed.returncode == 0, replayed.stderr
    found = json.loads(replayed.stdout)
    assert found["passed"] and [case["passed"] for case in found["cases"]] == [True] * 3

    # Beyond the window of 128, the same tokens as here.
    prompt = list(range(5, 145))
    done = on_box("generate", bundle, "--prompt-ids", ",".join(map(str, prompt)), "--max-new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    with Model.open(unpacked / "bundle", "portable") as model:
        here = [token for _, token in Generation(model, [prompt], max_new_tokens=8)]
    assert json.loads(done.stdout)["output_ids"] == here

    # Text too: the tokenizer is a library of its own.
    text = on_box("generate", bundle, "--prompt", "def read_lines(path):\n", "--max-new-tokens", "8", "--json")
    assert text.returncode == 0 and json.loads(text.stdout)["text"]
