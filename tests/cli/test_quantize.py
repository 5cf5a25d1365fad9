"""`galerne quantize` on the command line: what it prints, and what it refuses in one line with nothing written."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from galerne.cli import main

ROOT = Path(__file__).parents[2]
TINY, TEXT = ROOT / "examples" / "tiny-mistral", ROOT / "examples" / "tiny-mistral" / "held-out.txt"
GPTQ = """
description = "GPTQ for a test"
compute = "float16"
method = "gptq"
weights = { dtype = "int4", block_size = 32 }
lm_head = { dtype = "int8" }
calibration = { tokens = 256, length = 64 }
"""


def galerne(*args: object) -> tuple[int, str, str]:
    """Run the command line in this process: its exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as exited, redirect_stdout(out), redirect_stderr(err):
        main.run([str(arg) for arg in args])
    return int(exited.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "gptq.toml"
    path.write_text(GPTQ)
    return path


Refused = Callable[..., None]


@pytest.fixture
def refused(recipe: Path, tmp_path: Path) -> Refused:
    """Expect exit status 2, one line that ends stderr, and nothing new beside the inputs."""

    def check(message: str, source: Path = TINY, text: Path = TEXT, own: str | Path = recipe, *options: object) -> None:
        before = sorted(tmp_path.iterdir())
        status, out, err = galerne(
            "quantize", source, "--recipe", own, "--calibration", text, "--out", tmp_path / "out", *options
        )
        assert (status, out) == (2, "")
        last = err.strip().rsplit("\n", 1)[-1]
        assert last.startswith("galerne: ")
        assert message in last
        assert sorted(tmp_path.iterdir()) == before

    return check


def test_json_and_the_bundle_that_comes_of_it(recipe: Path, tmp_path: Path) -> None:
    made, bundle = tmp_path / "made", tmp_path / "bundle"
    status, out, err = galerne(
        "quantize", TINY, "--recipe", recipe, "--calibration", TEXT, "--out", made, "--tokens", 128, "--json"
    )
    assert status == 0, err
    assert json.loads(out) == {
        "checkpoint": str(made),
        "size_bytes": sum(file.stat().st_size for file in made.iterdir()),
        "recipe": "gptq.toml",
    }
    assert sorted(tmp_path.iterdir()) == [recipe, made]
    assert galerne("export", made, "--out", bundle)[0] == 0
    described = json.loads((bundle / "manifest.json").read_text())["recipe"]["description"]
    assert described.startswith("gptq.toml, calibrated on 128 tokens of held-out.txt: as the checkpoint has it")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty; expected text of at least 256 tokens"),
        (b"caf\xe9", "not UTF-8 at byte 3"),
        (b"too short", "tokens; expected at least 256"),
    ],
)
def test_unfit_text(refused: Refused, tmp_path: Path, data: bytes, message: str) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(data)
    refused(message, TINY, text)


def test_text_shorter_than_was_asked_for(refused: Refused, recipe: Path) -> None:
    refused("expected at least 1000000", TINY, TEXT, recipe, "--tokens", 1_000_000)
    refused("--length 512: expected from 2 to --tokens, which is 256", TINY, TEXT, recipe, "--length", 512)


def test_recipes_that_need_no_text(refused: Refused) -> None:
    refused("--recipe int4-rtn: needs no text; galerne export", TINY, TEXT, "int4-rtn")


def test_export_gives_the_two_commands(recipe: Path, tmp_path: Path) -> None:
    status, _, err = galerne("export", TINY, "--recipe", recipe, "--out", tmp_path / "bundle")
    assert status == 2
    assert f"galerne quantize {TINY} --recipe {recipe} --calibration TEXT --out FOLDER, then galerne export" in err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(recipe: Path, tmp_path: Path, bad: float, name: str) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors[name][5, 7] = bad
    save_file(tensors, source / "model.safetensors")
    status, out, err = galerne("quantize", source, "--recipe", recipe, "--calibration", TEXT, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    last = err.strip().rsplit("\n", 1)[-1]
    assert last == f"galerne: {source}: {name}: holds NaN or infinity; the checkpoint is damaged"
    assert sorted(tmp_path.iterdir()) == [recipe, source]


def test_weights_too_large_for_a_scale(recipe: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][5, 7] = 3e38
    save_file(tensors, source / "model.safetensors")
    status, out, err = galerne("quantize", source, "--recipe", recipe, "--calibration", TEXT, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.strip().endswith(f"galerne: {source}: {name}: a value is too large for a scale in float16")
    assert sorted(tmp_path.iterdir()) == [recipe, source]


def test_norms_that_are_not_finite_where_nothing_runs(recipe: Path, tmp_path: Path) -> None:
    """Rounding to nearest reads no norm, which is copied all the same."""
    recipe.write_text(GPTQ.replace('"gptq"', '"nearest"'))
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, source / "model.safetensors")
    status, _, err = galerne("quantize", source, "--recipe", recipe, "--calibration", TEXT, "--out", tmp_path / "out")
    assert status == 2
    assert err.strip().endswith(
        f"galerne: {source}: model.norm.weight: holds NaN or infinity; the checkpoint is damaged"
    )
    assert sorted(tmp_path.iterdir()) == [recipe, source]


@pytest.mark.parametrize("out", ["text.txt/out", "none/out"])
def test_a_destination_that_cannot_be(recipe: Path, tmp_path: Path, out: str) -> None:
    """Said before the source is read."""
    (tmp_path / "text.txt").write_text("x")
    status, _, err = galerne("quantize", TINY, "--recipe", recipe, "--calibration", TEXT, "--out", tmp_path / out)
    assert status == 2
    assert err.startswith(f"galerne: {(tmp_path / out).parent}: ") and err.count("\n") == 1


def test_a_block_that_does_not_divide(refused: Refused, saved_mistral: Callable[..., Path], tmp_path: Path) -> None:
    source = saved_mistral(intermediate_size=100, vocab_size=2048)
    shutil.copy(TINY / "tokenizer.json", source)
    refused("down_proj.weight: its input axis of 100 is divided by none of the int4 blocks", source)


def test_what_is_quantized_already(refused: Refused, tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    refused("no tensor of a quantized weight", source)


def test_a_destination_that_exists(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    status, _, err = galerne("quantize", TINY, "--recipe", recipe, "--calibration", TEXT, "--out", tmp_path / "out")
    assert (status, list((tmp_path / "out").iterdir())) == (2, [])
    assert "already exists; choose another output folder or remove it" in err
