"""The C++ program that embeds Python: built with CMake, run, and held against the same generation in Python."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.runtime.generate import Generation
from galerne.runtime.model import Model
from galerne.runtime.tokenizer import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow  # a C++ compiler takes its time

PROMPTS = ["def read_lines(path):\n", "import os\n", "class Stack:\n    def push("]
COUNT = 40


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("tiny") / "bundle"
    return export(open_checkpoint(EXAMPLES / "tiny-mistral"), recipe.load("fp32"), out)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    pytest.importorskip("pybind11")
    build = tmp_path_factory.mktemp("embed")
    configure: list[str | Path] = [
        "cmake",
        "-S",
        EXAMPLES / "embed",
        "-B",
        build,
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    configured = subprocess.run(configure, capture_output=True, text=True, check=False)
    if "Development.Embed" in configured.stderr:
        pytest.skip("this Python came without its shared library or headers")
    assert configured.returncode == 0, configured.stderr
    built = subprocess.run(["cmake", "--build", build], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in built.stdout + built.stderr
    return build / "embed"


def test_every_thread_gives_the_tokens_of_python(program: Path, bundle: Bundle) -> None:
    command: list[str | Path] = [program, bundle.path, str(COUNT), *PROMPTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t", 2) for line in done.stdout.splitlines()]
    model, tokenizer = Model.open(bundle.path), Tokenizer.open(bundle)
    for number, prompt in enumerate(PROMPTS):
        generation = Generation(model, [tokenizer.encode(prompt)], max_new_tokens=COUNT)
        list(generation)
        assert [int(token) for row, token, _ in lines if int(row) == number] == generation.outputs[0].ids
    assert "longest wait for the GIL" in done.stderr


def test_an_error_is_one_line_with_its_exit_status(program: Path, tmp_path: Path) -> None:
    done = subprocess.run([program, tmp_path / "none", "5", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"embed: {tmp_path / 'none'}: no such bundle folder\n"
