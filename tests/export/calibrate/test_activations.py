"""Recipes that round inputs: the scales that are written, SmoothQuant's factors, float8 weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from galerne.export.calibrate.quantize import quantize
from galerne.export.calibrate.rounded import round_weight
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.parity.streamed import StreamedModel
from galerne.export.text import sequences
from galerne.optimize.quantize import recipe
from galerne.optimize.quantize.recipe import WeightFormat
from galerne.runtime.tokenizer import Tokenizer

TINY = Path(__file__).parents[3] / "examples" / "tiny-mistral"
TEXT = Path(__file__).parents[3] / "examples" / "tiny-mistral" / "held-out.txt"
LARGEST = {"int8": 127, "float8e4m3fn": 448}


def write(folder: Path, kind: str, *, extra: str = "") -> Path:
    path = folder / f"{kind}.toml"
    path.write_text(
        f'description = "inputs in {kind}"\ncompute = "float16"\nactivations = "{kind}"\n{extra}'
        f'weights = {{ dtype = "{kind}" }}\nlm_head = {{ dtype = "int8" }}\n'
        "calibration = { tokens = 256, length = 32 }\n"
    )
    return path


def made(folder: Path, source: Path, kind: str, **changes: Any) -> Path:
    chosen = recipe.load(str(write(folder, kind, **changes)))
    return quantize(open_checkpoint(source), chosen, kind, TEXT, folder / f"made-{kind}")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("kind", ["int8", "float8e4m3fn"])
def test_input_scales_are_those_of_the_largest_input(
    kind: str, family_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = made(tmp_path, family_of("qwen2"), kind)
    ids = sequences(Tokenizer.parse((folder / "tokenizer.json").read_bytes(), 1, "", ""), TEXT, 32, 256)
    model, largest = StreamedModel(open_checkpoint(folder), rounded_inputs=False).model, dict[str, float]()

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(args[0].abs().max()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(name))
    with torch.inference_mode():
        model(torch.from_numpy(ids), use_cache=False)
    tensors = tensors_of(folder)
    scales = {name.removesuffix(".input_scale"): tensor for name, tensor in tensors.items() if "input_scale" in name}
    assert scales.keys() == largest.keys() - {"lm_head"}
    for name, scale in scales.items():
        assert (scale.dtype, scale.shape) == (torch.float32, (1,))
        # The calibration ran with the same rounded weights, but for those within the layer that come later.
        assert float(scale) * LARGEST[kind] == pytest.approx(largest[name], rel=1e-3)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    (rounding,) = (group for group in groups.values() if group["input_activations"] is not None)
    assert rounding["input_activations"]["strategy"] == "tensor"
    assert rounding["input_activations"]["dynamic"] is False
    assert rounding["targets"] == ["Linear"]


def test_wide_inputs_stay_as_they_are(family_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Their products have no scale, and no range goes over to their weights."""
    wide = 'smoothing = 0.5\nwide_inputs = ["*.down_proj.weight"]\n'
    folder = made(tmp_path, family_of("mistral"), "int8", extra=wide)
    (tmp_path / "plain").mkdir()
    plain = tensors_of(made(tmp_path / "plain", family_of("mistral"), "int8"))
    tensors, checkpoint = tensors_of(folder), open_checkpoint(folder)
    for product in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert f"model.layers.1.{product}.input_scale" in tensors
        packed = checkpoint.packed(f"model.layers.1.{product}.weight")
        assert packed is not None and packed.input_kind == "int8"
    down = "model.layers.1.mlp.down_proj"
    assert f"{down}.input_scale" not in tensors
    packed = checkpoint.packed(f"{down}.weight")
    assert packed is not None and packed.input_kind is None
    assert torch.equal(tensors[f"{down}.weight"], plain[f"{down}.weight"])


def test_float8_weights_are_what_transformers_reads(family_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made(tmp_path, family_of("mistral"), "float8e4m3fn")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    source, reference = open_checkpoint(family_of("mistral")), StreamedModel(open_checkpoint(folder))
    with torch.inference_mode():
        model(torch.arange(3, 9)[None])  # what is compressed is decompressed by the first run
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        expected = reference.weight(f"{name}.weight")
        assert torch.equal(model.get_parameter(f"{name}.weight").detach().float(), expected)
        original = source.read(f"{name}.weight")
        assert np.abs(original - expected.numpy()).max() <= np.abs(original).max() / 16 * 1.001


def test_float8_never_overflows_to_nan() -> None:
    # 448.1 times this scale's rounding down in float16 is beyond the largest float8.
    weight = np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32)
    rounded = round_weight("w", weight, WeightFormat("float8e4m3fn"), "nearest", None, "here")
    assert np.isfinite(rounded.dequantized()).all()
    assert np.abs(rounded.dequantized() - weight).max() <= np.abs(weight).max() / 16 * 1.001


def test_smoothing_takes_range_from_inputs_and_keeps_the_function(tmp_path: Path) -> None:
    plain = tensors_of(made(tmp_path, TINY, "int8"))
    (tmp_path / "smooth").mkdir()
    folder = made(tmp_path / "smooth", TINY, "int8", extra="smoothing = 0.5\n")
    smooth = tensors_of(folder)
    norm = "model.layers.1.input_layernorm.weight"
    factors = plain[norm].float() / smooth[norm]
    assert smooth[norm].dtype == torch.float32
    assert float(factors.max() / factors.min()) > 1.5
    product = "model.layers.1.self_attn.q_proj"
    weight = {
        which: t[f"{product}.weight"] * t[f"{product}.weight_scale"].float()
        for which, t in (("plain", plain), ("smooth", smooth))
    }
    step = smooth[f"{product}.weight_scale"].float()
    assert ((weight["smooth"] - weight["plain"] * factors).abs() <= 2 * step * factors.clamp(min=1)).all()
    ids = torch.arange(3, 100)[None]
    with torch.inference_mode():
        source, found = (
            torch.log_softmax(
                StreamedModel(open_checkpoint(path), rounded_inputs=False).model(ids, use_cache=False).logits, -1
            )
            for path in (TINY, folder)
        )
    assert float((source.exp() * (source - found)).sum(-1).mean()) < 2e-3
