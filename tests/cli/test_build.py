"""`galerne build` for GPUs as a pipeline calls it: which stack it takes and why, what it refuses, and its facts as JSON."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from galerne.cli import main
from galerne.optimize.builders.tensorrt.library import compute_capability_here
from galerne.runtime.bundle import Bundle

without_gpu = pytest.mark.skipif(compute_capability_here() is not None, reason="this machine has a GPU")


@pytest.fixture
def bundle(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_of("fp16").path, tmp_path / "bundle"))


def build(bundle: Path, *args: object) -> tuple[int, str, str]:
    """Return the exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as exited, redirect_stdout(out), redirect_stderr(err):
        main.run(["build", str(bundle), *map(str, args)])
    status = exited.value.code or 0
    assert isinstance(status, int)
    return status, out.getvalue(), err.getvalue()


@pytest.mark.tensorrt
def test_an_engine_ahead_of_time(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX's Python package is not installed")
    status, out, err = build(bundle, "--target", "l4", "--batch", "1:1:2", "--draft", 3, "--json")
    facts = json.loads(out)
    assert (status, facts["engine"], facts["backend"]) == (0, "l4", "tensorrt_rtx")
    assert facts["stack"] == "tensorrt-rtx-1.7"
    assert facts["parity"] == "none"
    assert "stack tensorrt-rtx-1.7: TensorRT-RTX 1.7" in err
    assert "is installed here" in err
    assert "warning: the bundle has no parity verdict" in err
    record = json.loads((bundle / "engines" / "l4" / "engine.json").read_text())
    assert [profile["name"] for profile in record["profiles"]] == ["decode", "draft", "prefill"]
    assert {tuple(profile["batch"]) for profile in record["profiles"]} == {(1, 1, 2)}


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--target", "l4", "--batch", "2:1"], 2, "--batch: expected MIN:OPT:MAX"),
        (["--target", "l4", "--draft", "8"], 2, "--draft: expected 0 to 7, found 8"),
        (["--target", "l4", "--strip", "--weight-streaming"], 2, "expected one of them, found both"),
        (["--target", "l4", "--stack", "none"], 2, "--stack: l4 has no stack named 'none'"),
        (["--target", "l4", "--stack", "tensorrt-rtx-1.7", "--locked"], 2, "--locked: TensorRT-RTX measures nothing"),
        (["--target", "cpu", "--draft", "2"], 2, "stack onnxruntime takes none of TensorRT's options"),
        (["--target", "jetson-orin-nx-16gb", "--stack", "jetpack-6.2"], 2, "export with --dialect primitive"),
        pytest.param(
            ["--target", "jetson-orin-nx-16gb", "--stack", "jetpack-7.2"], 3, "galerne package", marks=without_gpu
        ),
        pytest.param(
            ["--target", "h100-sxm", "--stack", "tensorrt-11"], 3, "build on a machine with one", marks=without_gpu
        ),
    ],
)
def test_what_is_refused_in_one_line(bundle: Path, args: list[str], status: int, message: str) -> None:
    found, out, err = build(bundle, *args)
    assert (found, out) == (status, "")
    assert message in err.splitlines()[-1]
    assert not (bundle / "engines" / args[1]).exists()
