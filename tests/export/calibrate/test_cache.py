"""Recipes that round keys and values: the scales that are written, and what comes of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from galerne.errors import InputError
from galerne.export.calibrate.quantize import quantize
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.streamed import CACHED, StreamedModel
from galerne.export.parity.verify import verify
from galerne.export.prequantized import choose_recipe
from galerne.export.text import sequences
from galerne.optimize.quantize import recipe
from galerne.optimize.quantize.cache import CacheScales
from galerne.runtime.tokenizer import Tokenizer

TINY = Path(__file__).parents[3] / "examples" / "tiny-mistral"
TEXT = TINY / "held-out.txt"
ROUNDINGS = {
    "wide": ("float16", "float16", ""),
    "nearest": ("int8", "int8", ""),
    "gptq": ("int4", "int8", 'method = "gptq"\n'),
    "awq": ("int4", "int8", 'method = "awq"\n'),
    "w8a8": ("int8", "int8", 'activations = "int8"\nsmoothing = 0.5\n'),
}


def made(folder: Path, source: Path, rounding: str) -> Path:
    weights, lm_head, extra = ROUNDINGS[rounding]
    block = ", block_size = 32" if weights == "int4" else ""
    path = folder / f"{rounding}.toml"
    path.write_text(
        f'description = "{rounding}"\ncompute = "float16"\ncache = "int8"\n{extra}'
        f'weights = {{ dtype = "{weights}"{block} }}\nlm_head = {{ dtype = "{lm_head}" }}\n'
        "calibration = { tokens = 256, length = 32 }\n"
    )
    return quantize(open_checkpoint(source), recipe.load(str(path)), rounding, TEXT, folder / "made")


def largest_of(folder: Path) -> dict[int, tuple[float, float]]:
    """Return what keys and values of each layer reach on the calibration text, with the weights as the folder has them."""
    ids = sequences(Tokenizer.parse((folder / "tokenizer.json").read_bytes(), 1, "", ""), TEXT, 32, 256)
    model, found = StreamedModel(open_checkpoint(folder)).model, dict[int, tuple[float, float]]()
    for number, layer in enumerate(model.model.layers):
        rounds = getattr(layer.self_attn, CACHED)

        def note(keys: Tensor, values: Tensor, number: int = number, rounds: Callable[..., object] = rounds) -> object:
            found[number] = (float(keys.abs().max()), float(values.abs().max()))
            return rounds(keys, values)

        setattr(layer.self_attn, CACHED, note)
    with torch.inference_mode():
        model(torch.from_numpy(ids), use_cache=False)
    return found


@pytest.mark.parametrize(
    ("family", "rounding"),
    [
        ("mistral", "gptq"),
        ("qwen3", "nearest"),
        # v's rows are divided by AWQ's factors where every head has a value of its own, by SmoothQuant's always, after the
        # ranges were taken.
        ("llama", "awq"),
        ("llama", "w8a8"),
        ("mistral", "w8a8"),  # two heads share each value, and so a factor
        ("phi3", "wide"),
        pytest.param("gemma3", "gptq", marks=pytest.mark.slow),
    ],
)
def test_scales_are_those_of_the_largest_key_and_value(
    family_of: Callable[[str], Path], tmp_path: Path, family: str, rounding: str
) -> None:
    folder = made(tmp_path, family_of(family), rounding)
    scales, largest = open_checkpoint(folder).cache_scales(), largest_of(folder)
    assert scales.keys() == largest.keys() == {0, 1}
    for number, own in scales.items():
        # Of a layer's own rounding only that of its later products and of what they read is not there when ranges are taken.
        assert (own.key * 127, own.value * 127) == pytest.approx(largest[number], rel=2e-2)
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert scheme == {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}


@pytest.mark.parametrize("family", ["mistral", pytest.param("tiny", marks=pytest.mark.slow)])
def test_scales_go_into_the_bundle_as_they_are(family_of: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """The whole way, past window and ring: quantize, export, verify."""
    folder = made(tmp_path, TINY if family == "tiny" else family_of(family), "nearest")
    checkpoint = open_checkpoint(folder)
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    assert checkpoint.cache_scales() == {
        number: CacheScales("int8", *(stored[f"model.layers.{number}.self_attn.{part}_scale"].item() for part in "kv"))
        for number in range(4 if family == "tiny" else 2)
    }
    bundle = export(checkpoint, choose_recipe(checkpoint, None, None), tmp_path / "bundle", chunk=32)
    assert "nearest, calibrated on 256 tokens" in bundle.manifest.recipe["description"]
    report = verify(bundle, checkpoint)
    assert report.passed, [(case.name, case.failures) for case in report.all_cases if not case.passed]
    assert report.arithmetic == "rounded cache" and report.unrounded is not None


def test_the_recipe_that_ships_needs_text(tmp_path: Path) -> None:
    shipped = recipe.load("int8-kv8")
    assert (shipped.cache, shipped.calibrated, shipped.weights.dtype) == ("int8", True, "int8")
    with pytest.raises(InputError, match="--recipe int8-kv8: needs calibration text: galerne quantize"):
        choose_recipe(open_checkpoint(TINY), None, "int8-kv8")
