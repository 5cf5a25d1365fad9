"""The command line as a pipeline calls it: exit codes, JSON alone on stdout, one line for bad input."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from galerne.cli import main
from galerne.cli.export import Precision
from galerne.errors import BackendError, CheckFailed, InputError
from galerne.optimize.quantize.recipe import PRECISIONS
from galerne.runtime import bench
from galerne.runtime.bundle import Bundle
from galerne.runtime.rows import Rows
from galerne.targets.target import load as load_target

Adapt = Callable[..., Any]
Bundles = Callable[[str], Bundle]


class Ran:
    """One run of the command line in this process: its exit status and what it wrote."""

    def __init__(self, *args: object) -> None:
        out, err = io.StringIO(), io.StringIO()
        with pytest.raises(SystemExit) as exited, redirect_stdout(out), redirect_stderr(err):
            main.run([str(arg) for arg in args])
        self.status = exited.value.code or 0
        self.out, self.err = out.getvalue(), err.getvalue()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def bundle(bundle_of: Bundles, tmp_path: Path) -> Path:
    """A bundle of its own for a test that changes it."""
    return Path(shutil.copytree(bundle_of("int4-rtn").path, tmp_path / "bundle"))


def test_precisions_are_those_of_the_recipes() -> None:
    assert list(PRECISIONS) == list(Precision.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("error", "status"), [(CheckFailed, 1), (InputError, 2), (BackendError, 3)])
def test_each_error_has_its_exit_status(error: type[Exception], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("one line")

    monkeypatch.setattr(main, "app", fail)
    ran = Ran("targets")
    assert (ran.status, ran.out, ran.err) == (status, "", "galerne: one line\n")


def test_our_own_bug_is_a_traceback_and_70(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "app", lambda *_, **__: os.environ["MISSING"])
    ran = Ran("targets")
    assert ran.status == 70
    assert "KeyError: 'MISSING'" in ran.err
    assert "bug in Galerne" in ran.err


@pytest.mark.parametrize("module", ["onnx_ir", "torch"])
def test_a_package_of_an_extra_is_named_with_it(module: str) -> None:
    """As on a box that has the runtime only. In a process of its own, where nothing has imported it yet."""
    program = f"import sys; sys.modules[{module!r}] = None\nfrom galerne.cli.main import run\nrun(sys.argv[1:])"
    command = [sys.executable, "-c", program, "demo" if module == "torch" else "check", "--help"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0  # help needs nothing
    command[-2:] = ["export", "nowhere", "--out", "nowhere"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr == f"galerne: {module} is not installed, which this needs: pip install 'galerne[export]'\n"


def test_fit_needs_the_runtime_only(bundle_of: Bundles) -> None:
    """On a box, of a bundle: neither onnx nor torch."""
    program = "import sys; sys.modules.update(onnx=None, onnx_ir=None, torch=None, transformers=None)\n"
    program += "from galerne.cli.main import run\nrun(sys.argv[1:])"
    command = [sys.executable, "-c", program, "fit", str(bundle_of("fp16").path), "--target", "h200"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, "NVIDIA H200" in ran.stdout) == (0, True), ran.stderr


def test_bad_usage_is_2() -> None:
    for args in (["frobnicate"], ["export"], ["generate", "x", "--max-new-tokens", "many"]):
        assert Ran(*args).status == 2


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(main.app, ["--help"])
    for command in ("demo", "export", "verify", "check", "build", "generate", "bench", "inspect", "synth", "targets"):
        assert command in result.output


def test_the_whole_way(checkpoint_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    exported = Ran("export", checkpoint_folder, "--out", out, "--precision", "int4", "--chunk", 8, "--json")
    assert exported.status == 0
    assert exported.json["capacities"] == [24]
    verified = Ran("verify", out, "--source", checkpoint_folder, "--html", tmp_path / "report.html", "--json")
    assert verified.status == 0, verified.err
    assert verified.json["passed"] is True
    assert {"name", "tokens", "max_abs", "mean_kl", "top1_agreement", "passed"} <= set(verified.json["cases"][0])
    assert "<html" in (tmp_path / "report.html").read_text()
    built = Ran("build", out, "--target", "cpu", "--json")
    assert built.status == 0
    assert built.json["parity"] == "passed"
    generated = Ran("generate", out, "--prompt-ids", "1,2,3", "--max-new-tokens", 5, "--json")
    assert generated.status == 0
    assert generated.json["engine"] == "cpu"
    assert generated.json["prompt_ids"] == [1, 2, 3]
    assert len(generated.json["output_ids"]) <= 5
    rates = {"load_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
    assert generated.json["timings"].keys() == {*rates, "drafted_tokens"}
    ids = ("--prompt-ids", "1,2,3,1,2,3", "--max-new-tokens", 9, "--json")
    plain, speculated = Ran("generate", out, *ids), Ran("generate", out, *ids, "--speculate", 4)
    assert speculated.json["output_ids"] == plain.json["output_ids"]
    shown = Ran("inspect", out, "--json")
    assert shown.json["hashes_hold"] is True
    assert shown.json["model"]["layer_windows"] == [16, 16]
    assert shown.json["engines"] == ["cpu"]
    measured = Ran("bench", out, "--prompt-tokens", 20, "--decode-tokens", 3, "--json")
    assert measured.json["decode_tokens_per_s"] > 0


def test_bench_beside_warns_of_the_slower_bundle(
    bundle: Path, bundle_of: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps are real and only their times are not: what a test machine does meanwhile must not decide."""
    wide, real = bundle_of("fp32").path, bench._steps

    def steps(rows: Rows, token: int, count: int) -> list[float]:
        return [0.02 if rows.model.bundle.path == bundle else 0.01 for _ in real(rows, token, count)]

    monkeypatch.setattr(bench, "_steps", steps)
    sizes = ("--prompt-tokens", 20, "--decode-tokens", 11, "--json")
    slower, faster = Ran("bench", bundle, "--beside", wide, *sizes), Ran("bench", wide, "--beside", bundle, *sizes)
    assert (slower.status, slower.json["slower_than_beside"]) == (0, True)
    rates = {"engine": "portable", "decode_tokens_per_s": 50.0, "beside_tokens_per_s": 100.0}
    assert slower.json["beside"] == rates
    assert f"warning: {bundle} decodes slower than {wide}: 50.0 tokens/s to" in slower.err
    assert (faster.status, faster.json["slower_than_beside"]) == (0, False)
    assert "warning" not in faster.err
    alone = Ran("bench", bundle, *sizes)
    assert "slower_than_beside" not in alone.json
    assert Ran("bench", bundle, "--beside", wide, "--adapter", bundle).status == 2


@pytest.mark.parametrize(("rate", "slower"), [(100.0, False), (96.0, False), (94.0, True), (130.0, False)])
def test_a_bundle_is_slower_by_more_than_noise(rate: float, slower: bool) -> None:
    assert bench.Beside("cpu", rate, 100.0).slower is slower


def test_synth(tmp_path: Path) -> None:
    made = Ran("synth", "gemma-3-270m", "--out", tmp_path / "out", "--layers", 1, "--json")
    assert made.status == 0, made.err
    assert made.json["size_bytes"] > 2 * made.json["weights"] > 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    wrong = Ran("synth", "gemma", "--out", tmp_path / "wrong")
    assert (wrong.status, wrong.err.count("\n")) == (2, 1)
    assert "there are benchmark-1b, gemma-3-270m" in wrong.err


def test_a_failed_check_is_1_and_no_engine_is_built_from_it(bundle: Path, tmp_path: Path) -> None:
    Bundle.open(bundle).with_verdict("portable", b"{}\n", passed=False)
    refused = Ran("build", bundle, "--target", "cpu")
    assert refused.status == 1
    assert "parity check failed" in refused.err.splitlines()[-1]
    assert not (bundle / "engines").exists() or not any((bundle / "engines").iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt-ids", "501"], "--prompt-ids: 501 is out of the vocabulary; expected 0 to 500"),
        (["--prompt-ids", "1,x"], "--prompt-ids: expected whole numbers with commas between, found 'x'"),
        (["--prompt-ids", ""], "--prompt-ids: expected whole numbers"),
        (["--prompt", "hello"], "no tokenizer.json in the bundle"),
        (["--prompt", ""], "--prompt: empty"),
        (["--chat", ""], "--chat: empty"),
        (["--prompt", "\udcff"], "--prompt: not UTF-8"),
        (["--prompt-file", "no/such"], "--prompt-file no/such: No such file"),
        ([], "expected one of --prompt"),
        (["--prompt-ids", "1", "--temperature", "-1"], "temperature"),
        (["--prompt-ids", "1", "--engine", "rtx-4090"], "no engine named 'rtx-4090'"),
    ],
)
def test_bad_prompts_are_one_line_and_2(bundle_of: Bundles, args: list[str], message: str) -> None:
    ran = Ran("generate", bundle_of("int4-rtn").path, *args)
    assert ran.status == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == ""


def test_prompt_file_that_is_not_utf8(bundle_of: Bundles, tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    ran = Ran("generate", bundle_of("int4-rtn").path, "--prompt-file", tmp_path / "latin1")
    assert ran.status == 2
    assert "not UTF-8 at byte 3" in ran.err


def test_a_changed_byte_is_found(bundle: Path) -> None:
    data = bytearray((bundle / "weights.bin").read_bytes())
    data[5000] ^= 1
    (bundle / "weights.bin").write_bytes(data)
    ran = Ran("inspect", bundle)
    assert ran.status == 2
    assert "weights.bin: its SHA-256 is" in ran.err


def test_json_is_alone_on_stdout(checkpoint_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, since libraries also write to the streams' file descriptors."""
    command = [
        sys.executable,
        "-m",
        "galerne.cli",
        "export",
        str(checkpoint_folder),
        "--out",
        str(tmp_path / "b"),
        "--json",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["bundle"] == str(tmp_path / "b")
    assert "trace MistralForCausalLM" in ran.stderr


def test_targets_table_and_json() -> None:
    shown = Ran("targets").out
    assert "rtx-4090" in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert [target["name"] for target in Ran("targets", "l4", "--json").json] == ["l4"]
    wrong = Ran("targets", "rtx4090")
    assert wrong.status == 2
    assert "rtx-4090" in wrong.err


def test_a_targets_page_has_its_modes_stacks_and_sources() -> None:
    page = Ran("targets", "jetson-orin-nx-16gb").out
    assert "10W                   1     10    68 GB/s" in page
    assert "jetpack-6.2  tensorrt 10.3   12.6    3.10  primitive  the device  fp32 fp16 int8 int4" in page
    assert page.count("https://") >= 5
    assert "measured on the spot" in Ran("targets", "cpu").out


def test_check_says_no_with_1_and_what_to_do(bundle_of: Bundles) -> None:
    path = bundle_of("int4-rtn").path
    fine = Ran("check", path, "--target", "jetson-orin-nx-16gb", "--stack", "jetpack-7.2")
    assert (fine.status, fine.err) == (0, "")
    assert fine.out == "NVIDIA Jetson Orin NX 16GB with jetpack-7.2 takes all of it\n"
    no = Ran("check", path, "--target", "jetson-orin-nx-16gb")
    assert no.status == 1
    assert "/model/layers.0/self_attn/Attention" in no.out
    assert no.err.count("\n") == 1
    assert "export with --dialect primitive, or choose --stack jetpack-7.2" in no.err
    told = Ran("check", path, "--target", "t4", "--json")
    assert (told.status, told.json["passed"], told.json["stack"]) == (1, False, "tensorrt-rtx-1.7")
    assert {(r["operator"], r["found"]) for r in told.json["refusals"]} == {("DequantizeLinear", "int4")}
    assert Ran("check", path, "--target", "t4", "--stack", "x").status == 2


def test_the_dialect_is_chosen_and_shown(checkpoint_folder: Path, tmp_path: Path) -> None:
    assert Ran("export", checkpoint_folder, "--out", tmp_path / "basic", "--dialect", "primitive").status == 0
    assert "primitive, ONNX opset 20" in Ran("inspect", tmp_path / "basic").out
    graph = Ran("inspect", tmp_path / "basic", "--json").json["graph"]
    assert (graph["dialect"], graph["opset"]) == ("primitive", 20)
    refused = Ran("export", checkpoint_folder, "--out", tmp_path / "other", "--dialect", "opset25")
    assert (refused.status, refused.out) == (2, "")
    assert "opset25" in refused.err


def test_an_adapter_at_run_time(adapt: Adapt, checkpoint_folder: Path, tmp_path: Path) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    options = ["export", checkpoint_folder, "--chunk", 8, "--precision", "fp32"]
    assert Ran(*options, "--out", tmp_path / "slots", "--adapter-slots").status == 0
    assert Ran(*options, "--out", tmp_path / "merged", "--adapter", tmp_path / "adapter").status == 0
    assert "adapters 9 slots" in Ran("inspect", tmp_path / "slots").out

    def generated(bundle: str, *more: object) -> Any:
        ran = Ran("generate", tmp_path / bundle, "--prompt-ids", "1,2,3", "--max-new-tokens", 12, "--json", *more)
        assert ran.status == 0, ran.err
        return ran.json["output_ids"]

    for more in ([], ["--adapter", tmp_path / "adapter"]):
        assert Ran("verify", tmp_path / "slots", "--source", checkpoint_folder, *more).status == 0
    adapted = generated("slots", "--adapter", tmp_path / "adapter")
    assert adapted == generated("merged") != generated("slots")
    sizes = ["--prompt-tokens", 20, "--decode-tokens", 3]
    assert Ran("bench", tmp_path / "slots", *sizes, "--adapter", tmp_path / "adapter").status == 0
    refused = Ran("generate", tmp_path / "merged", "--prompt-ids", "1", "--adapter", tmp_path / "adapter")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "has no adapter slots; export it with --adapter-slots" in refused.err


def test_the_bound_of_an_engine_is_that_of_what_runs_it() -> None:
    assert bench.bandwidth_of("rtx-4090") == load_target("rtx-4090").bandwidth_bytes_per_s
    assert bench.bandwidth_of("cuda") is None
    measured = bench.bandwidth_of("portable")
    assert measured is not None and 1e8 < measured < 1e13
