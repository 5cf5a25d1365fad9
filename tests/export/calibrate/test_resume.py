"""A run that was stopped goes on where it was, to the same bytes; what belongs to another run is not gone on from."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TINY, TEXT = ROOT / "examples" / "tiny-mistral", ROOT / "examples" / "tiny-mistral" / "held-out.txt"
LAYERS = 4

Files = dict[str, bytes]


def start(recipe: Path, out: Path, text: Path = TEXT, threads: int = 1) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "galerne.cli", "quantize", TINY, "--recipe", recipe, "--calibration", text]
    return subprocess.Popen(
        [*map(str, command), "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)},
        # A shell's background job may have been started to ignore it, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def files(folder: Path) -> Files:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def finish(process: "subprocess.Popen[str]") -> str:
    _, err = process.communicate()
    assert process.returncode == 0, err
    return err


def stop_after(process: "subprocess.Popen[str]", out: Path, layers: int, how: signal.Signals) -> str:
    """Send a signal as soon as some layers are written, and return stderr."""
    file = out.with_name(f"{out.name}.unfinished") / f"model-{layers:05}-of-{LAYERS + 1:05}.safetensors"
    deadline = time.monotonic() + 240
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(how)
    _, err = process.communicate()
    assert not out.exists()
    return err


@pytest.fixture(scope="module", params=["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def recipe(
    request: pytest.FixtureRequest, make_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_recipe(tmp_path_factory.mktemp("recipe"), request.param, tokens=512, length=64)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What a run that was let be writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finish(start(recipe, out))
    return files(out)


@pytest.mark.parametrize(
    "layers", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_killed(recipe: Path, whole: Files, tmp_path: Path, layers: int) -> None:
    out = tmp_path / "out"
    stop_after(start(recipe, out), out, layers, signal.SIGKILL)
    err = finish(start(recipe, out))
    assert f"out.unfinished: goes on after layer {layers} of 4" in err or f"after layer {layers + 1} of 4" in err
    assert files(out) == whole
    assert os.listdir(tmp_path) == ["out"]


def test_bytes_do_not_depend_on_the_number_of_threads(recipe: Path, whole: Files, tmp_path: Path) -> None:
    finish(start(recipe, tmp_path / "out", threads=2))
    assert files(tmp_path / "out") == whole


def test_interrupted(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(make_recipe(tmp_path, tokens=512, length=64), out)
    err = stop_after(process, out, 2, signal.SIGINT)
    assert process.returncode == 130
    assert "of 4 layers; the same command goes on from there" in err
    assert "Traceback" not in err


def test_another_text_starts_afresh(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text.md"
    recipe = make_recipe(tmp_path, tokens=512, length=64)
    stop_after(start(recipe, out), out, 1, signal.SIGKILL)
    text.write_text(TEXT.read_text() + "more")
    err = finish(start(recipe, out, text))
    assert "out.unfinished: left by a run on other input, by another recipe or another version; starting afresh" in err
    assert "goes on" not in err


def test_two_runs_at_once_are_refused(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", make_recipe(tmp_path, tokens=512, length=64)
    first = start(recipe, out)
    while not (out.with_name("out.unfinished") / "galerne.json").exists() and first.poll() is None:
        time.sleep(0.001)
    second = start(recipe, out)
    _, err = second.communicate()
    finish(first)
    assert second.returncode == 2
    assert "another run is at work there" in err or "already exists" in err
