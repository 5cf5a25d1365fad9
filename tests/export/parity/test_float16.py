"""Models that amplify what float16 rounds: right bundles of them pass, wrong ones do not."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import galerne.export.export
from galerne.export.calibrate.quantize import quantize
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.families.registry import read_spec
from galerne.export.parity.float16 import widened
from galerne.export.parity.tolerances import TABLE
from galerne.export.parity.verify import verify
from galerne.export.prequantized import choose_recipe
from galerne.export.spec import DecoderSpec
from galerne.optimize.quantize import recipe

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def restless(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random Mistral whose large weights make attention jump from one key to another at the least change."""
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=2048,
        max_position_embeddings=512,
        initializer_range=0.3,
        sliding_window=16,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )
    folder = tmp_path_factory.mktemp("restless")
    MistralForCausalLM(config).save_pretrained(folder)
    shutil.copy(ROOT / "examples" / "tiny-mistral" / "tokenizer.json", folder)
    return open_checkpoint(folder)


def test_the_reference_itself_shows_what_to_allow(restless: Checkpoint, tmp_path: Path) -> None:
    report = verify(export(restless, recipe.load("fp16"), tmp_path / "bundle", chunk=8), restless)
    assert report.passed, [case.failures for case in report.cases]
    row = TABLE["float16"].limits(report.logits_std)
    assert max(case.mean_kl or 0 for case in report.cases) > row.max_mean_kl
    assert (
        row.max_mean_kl
        < report.tolerances.max_mean_kl
        < TABLE["int8 activations"].limits(report.logits_std).max_mean_kl
    )
    assert "amplifies" in report.tolerances.source


def test_a_wrong_window_shows_all_the_same(
    restless: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misread(config: dict[str, Any], where: str) -> DecoderSpec:
        return dataclasses.replace(read_spec(config, where), layer_windows=(17,) * 4)

    monkeypatch.setattr(galerne.export.export, "read_spec", misread)
    report = verify(export(restless, recipe.load("fp16"), tmp_path / "bundle", chunk=8), restless)
    assert not report.passed
    assert {"prompt of 17", "prompt of 67"} <= {case.name for case in report.cases if not case.passed}


def test_float8_without_its_rounding_of_inputs(restless: Checkpoint, tmp_path: Path) -> None:
    """Its products are float16's then, and no further off than those of fp16."""
    text = ROOT / "examples" / "tiny-mistral" / "held-out.txt"
    folder = quantize(restless, recipe.load("fp8"), "fp8", text, tmp_path / "fp8", tokens=512, length=64)
    checkpoint = open_checkpoint(folder)
    report = verify(export(checkpoint, choose_recipe(checkpoint, None, None), tmp_path / "bundle", chunk=8), checkpoint)
    assert report.unrounded is not None
    assert report.passed, [case.failures for case in report.all_cases]


def test_limits_are_never_narrower_and_end_where_int8_does() -> None:
    random = np.random.default_rng(0)
    logits = random.standard_normal((40, 300)).astype(np.float32)
    row = TABLE["float16"].limits(1.0)
    assert widened(row, logits, logits, 1.0) == row
    moved = logits + 0.03 * random.standard_normal(logits.shape).astype(np.float32)
    wider = widened(row, logits, moved, 1.0)
    assert wider.max_mean_kl > 50 * row.max_mean_kl and wider.max_abs == pytest.approx(4 * np.abs(moved - logits).max())
    far = widened(row, logits, random.standard_normal(logits.shape).astype(np.float32), 1.0)
    most = TABLE["int8 activations"].limits(1.0)
    assert (far.max_abs, far.max_mean_kl, far.min_top1_agreement) == (
        most.max_abs,
        most.max_mean_kl,
        most.min_top1_agreement,
    )
    moved[3, 5] = np.inf
    assert widened(row, logits, moved, 1.0) == row
