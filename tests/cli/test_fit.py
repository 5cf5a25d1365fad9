"""`galerne fit` as it is called: what it prints, its exit status, and one line for bad input."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from galerne.cli import main
from galerne.cli.output import parse_bytes
from galerne.errors import InputError
from galerne.export.preset import preset_config
from galerne.runtime.bundle import Bundle

Bundles = Callable[[str], Bundle]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(preset_config("mistral-7b-v0.1")))
    return path


class Ran:
    """One run of the command line in this process."""

    def __init__(self, *args: object) -> None:
        out, err = io.StringIO(), io.StringIO()
        with pytest.raises(SystemExit) as exited, redirect_stdout(out), redirect_stderr(err):
            main.run(["fit", *map(str, args)])
        self.status = exited.value.code or 0
        self.out, self.err = out.getvalue(), err.getvalue()

    @property
    def json(self) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads(self.out)
        return tree


def test_json_of_a_config(config: Path) -> None:
    done = Ran(config, "--target", "l4", "--precision", "int4", "--json")
    assert done.status == 0, done.err
    found = done.json
    assert found["fits"] is True and found["recipe"] == "int4-rtn" and found["max_context"] is None
    assert set(found["memory_bytes"]) == {"weights", "cache", "activations", "workspace", "runtime"}
    assert found["total_bytes"] == sum(found["memory_bytes"].values())
    assert found["decode_bound_tokens_per_s"] > 50 and found["prefill_bound_tokens_per_s"] > 1000
    assert found["max_batch"] > 1 and found["best_recipe"] == "fp16"
    assert [each["name"] for each in found["recipes"]][:3] == ["fp32", "fp16", "bf16"]


def test_a_folder_a_file_and_a_preset_are_the_same(config: Path) -> None:
    sizes = [Ran(source, "--target", "l4", "--json").json["memory_bytes"] for source in (config, config.parent)]
    assert sizes[0] == sizes[1] == Ran("mistral-7b-v0.1", "--target", "l4", "--json").json["memory_bytes"]


def test_a_bundle_is_asked_with_its_own_recipe(bundle_of: Bundles) -> None:
    bundle = bundle_of("int4-rtn").path
    found = Ran(bundle, "--target", "rtx-4090", "--json").json
    assert found["recipe"] == "int4-rtn" and found["chunk"] == 8
    assert found["memory_bytes"]["cache"] == 2 * 24 * 2 * 2 * 32 * 2  # layers, window and chunk, a key and a value
    other = Ran(bundle, "--target", "rtx-4090", "--recipe", "fp16", "--json").json
    assert other["recipe"] == "fp16" and other["memory_bytes"]["weights"] > found["memory_bytes"]["weights"]


def test_this_machine(bundle_of: Bundles) -> None:
    done = Ran(bundle_of("fp32").path, "--target", "cpu", "--context", "64")
    assert done.status == 0, done.err
    assert "fp32: weights" in done.out and "longest context any" in done.out


def test_what_does_not_fit_exits_with_1_and_one_line() -> None:
    done = Ran("mistral-7b-v0.1", "--target", "jetson-orin-nx-16gb", "--precision", "fp16", "--json")
    assert done.status == 1 and done.json["fits"] is False
    (line,) = done.err.splitlines()
    assert line.startswith("galerne: mistral-7b-v0.1 as fp16 does not fit jetson-orin-nx-16gb: it takes ")
    assert "more than the usable" in line and line.endswith(" GB") and "the recipe int8 fits" in line


def test_a_build_that_needs_swap_is_a_warning() -> None:
    done = Ran("mistral-7b-v0.1", "--target", "jetson-orin-nano-8gb")
    assert done.status == 0
    (line,) = done.err.splitlines()
    assert line.startswith("warning: building the engine there takes up to ") and "swap" in line


def test_a_plot(tmp_path: Path) -> None:
    done = Ran("mistral-7b-v0.1", "--target", "l4", "--plot", tmp_path / "fit.html")
    assert done.status == 0 and "</svg>" in (tmp_path / "fit.html").read_text()


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["mistral-7b-v0.1", "--target", "rtx4090"], "--target: no target named 'rtx4090'; did you mean 'rtx-4090'?"),
        (["mistral-7b-v0.1", "--target", "l4", "--stack", "x"], "--stack: l4 has no stack named 'x'"),
        (["mistral-7b-v0.1", "--target", "l4", "--context", "0"], "--context: expected at least 1, found 0"),
        (["mistral-7b-v0.1", "--target", "l4", "--batch", "0"], "--batch: expected at least 1, found 0"),
        (["mistral-7b-v0.1", "--target", "l4", "--batch", "-1"], "--batch: expected at least 1, found -1"),
        (["mistral-7b-v0.1", "--target", "l4", "--memory-budget", "abc"], "--memory-budget: expected a number of bytes"),
        (["mistral-7b-v0.1", "--target", "l4", "--memory-budget", "0"], "--memory-budget: expected at least 1, found 0"),
        (["mistral-7b-v0.3", "--target", "l4", "--context", "99999"], "the longest context of mistral-7b-v0.3 is 32768"),
        (["mistral-7b-v0.1", "--target", "l4", "--recipe", "int3"], "recipe 'int3': unknown"),
        (["mistral-7b-v0.1", "--target", "l4", "--recipe", "int8", "--precision", "int8"], "give one of them"),
        (["mistral-7b-v0.1", "--target", "l4", "--plot", "x.png"], "--plot x.png: expected a name that ends in"),
        (["nowhere", "--target", "l4"], "nowhere: no such file or folder; expected a bundle, a config.json"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(args: list[str], part: str) -> None:
    done = Ran(*args)
    assert done.status == 2 and done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("galerne: ") and part in line


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not JSON"),
        ("[]", "expected a table"),
        ("{}", "architectures: [] is not supported; supported: "),
        ('{"architectures": ["GPT2LMHeadModel"]}', "architectures: ['GPT2LMHeadModel'] is not supported"),
        ('{"architectures": ["MistralForCausalLM"]}', "sliding_window: missing"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line(content: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    done = Ran(tmp_path / "config.json", "--target", "l4")
    assert done.status == 2 and part in done.err and len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6GB", 6 * 10**9), ("6 GiB", 6 << 30), ("1.5gb", 1_500_000_000), ("123", 123), ("512MiB", 512 << 20), ("7b", 7)],
)
def test_budgets(text: str, expected: int) -> None:
    assert parse_bytes("--memory-budget", text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-6GB", "6XB", "6GBs", "1e9", "nan"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--memory-budget"):
        parse_bytes("--memory-budget", text)
