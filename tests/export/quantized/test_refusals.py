"""What cannot be kept of a quantized checkpoint is refused in one line that names it, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from galerne.cli import main
from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.prequantized import choose_recipe
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle

Maker = Callable[..., Any]
Exported = Callable[[Path, Path], Bundle]


def test_wide_recipes_are_refused(make_awq: Maker, tmp_path: Path) -> None:
    made = make_awq(tmp_path / "awq")
    checkpoint = open_checkpoint(made.folder)
    with pytest.raises(InputError, match="quantized already with AWQ, and kept as it is; leave --precision int4 out"):
        choose_recipe(checkpoint, "int4", None)
    with pytest.raises(InputError, match="leave --recipe int8 out"):
        choose_recipe(checkpoint, None, "int8")
    with pytest.raises(InputError, match="the recipe is for another checkpoint"):
        export(checkpoint, recipe.load("fp16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["int8-w8a8", "fp8"])
def test_recipes_that_round_inputs_are_not_exported_at_once(checkpoint_folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="needs calibration text: galerne quantize"):
        export(open_checkpoint(checkpoint_folder), recipe.load(name), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("maker", "config", "message"),
    [
        (
            "awq",
            {"quant_method": "bitsandbytes"},
            "quant_method: 'bitsandbytes' is not supported; expected awq, gptq, compr",
        ),
        ("awq", {"quant_method": None}, "quant_method: None is not supported"),
        ("awq", {"bits": 3}, "bits: 3 is not supported with awq; expected 4"),
        ("awq", {"version": "gemv"}, "version: 'gemv' is not supported with awq; expected 'gemm'"),
        ("gptq", {"bits": 3}, "bits: 3 is not supported with gptq; expected 4 or 8"),
        ("gptq", {"bits": 8}, "qzeros: shape .*; expected .* at 8 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format: 'marlin' is not supported"),
        ("gptq", {"pack_dtype": "int8"}, "pack_dtype: 'int8' is not supported"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic: settings for single modules are not supported"),
        ("compressed", {"format": "nvfp4-pack-quantized"}, "format: 'nvfp4-pack-quantized' is not supported"),
        ("compressed", {"config_groups": []}, "config_groups: expected a table of tables"),
        (
            "compressed",
            {"config_groups": {"g": {"weights": {"num_bits": 2}}}},
            "num_bits: 2 of type 'int' is not supported",
        ),
        (
            "compressed",
            {"transform_config": {"config_groups": {"u": {}}}},
            "transform_config: weights that were rotated",
        ),
        (
            "compressed",
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "format 'sparse-24-bitmask' is not supported",
        ),
    ],
)
def test_a_config_that_is_not_read_is_named(
    make_awq: Maker,
    make_gptq: Maker,
    make_compressed: Maker,
    tmp_path: Path,
    maker: str,
    config: dict[str, Any],
    message: str,
) -> None:
    if maker == "compressed":
        folder = make_compressed(tmp_path / "made", "int4 groups", **config).folder
    else:
        folder = {"awq": make_awq, "gptq": make_gptq}[maker](tmp_path / "made", bits=4).folder
        table = json.loads((folder / "config.json").read_text())
        table["quantization_config"] |= config
        (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_the_command_line_says_it_in_one_line(
    make_awq: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_awq(tmp_path / "awq")
    for arguments, message in (
        (["--precision", "int4"], "quantized already with AWQ"),
        (["--adapter", str(tmp_path / "none")], "an adapter can be merged into floats only"),
    ):
        with pytest.raises(SystemExit) as exited:
            main.run(["export", str(made.folder), "--out", str(tmp_path / "out"), *arguments])
        captured = capsys.readouterr()
        assert exited.value.code == 2 and captured.out == ""
        assert message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def _damage(part: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    def run(tensors: dict[str, Tensor]) -> None:
        name = f"model.layers.1.mlp.up_proj.{part}"
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed

    return run


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage("scales", lambda _: None), "up_proj.scales: missing, but .*up_proj.* is there"),
        (
            _damage("scales", lambda tensor: tensor[:, :-8].contiguous()),
            r"up_proj.scales: shape .*; expected \[4, 160\] from",
        ),
        (_damage("qzeros", lambda tensor: tensor[:-1].contiguous()), "up_proj.qzeros: shape .*; expected"),
        (
            _damage("qweight", lambda tensor: tensor[:-1].contiguous()),
            "up_proj.scales: 4 groups do not divide 120 input|g_idx",
        ),
        (_damage("qweight", lambda tensor: tensor.float()), "up_proj.qweight: type float32; expected int32"),
        (_damage("scales", lambda tensor: tensor * float("nan")), "up_proj.scales: holds NaN or infinity"),
        (
            _damage("g_idx", lambda tensor: tensor * 0),
            "up_proj.g_idx: expected 4 groups of 32 input features, found others",
        ),
        (
            _damage("qzeros", lambda tensor: tensor * 0 - 1),
            "up_proj.qzeros: a zero point of 0, which libraries read differently",
        ),
    ],
)
def test_damaged_tensors_are_named_and_leave_nothing(
    make_gptq: Maker, exported: Exported, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    folder = make_gptq(tmp_path / "gptq").folder
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        exported(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]


def test_a_bias_is_refused_unless_it_is_zero(make_gptq: Maker, exported: Exported, tmp_path: Path) -> None:
    """auto-gptq stores biases of zeros where the model has none."""
    folder = make_gptq(tmp_path / "gptq").folder
    tensors = load_file(folder / "model.safetensors")
    bias = tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(160, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")
    exported(folder, tmp_path / "out")
    bias[3] = 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"up_proj.bias: no part of a MistralForCausalLM"):
        exported(folder, tmp_path / "other")
