"""Layers with a window beside layers that see every key: each kind has rings of its own size."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import MinistralConfig, MinistralForCausalLM

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.verify import verify
from galerne.optimize.builders.build import build
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import GRAPH
from galerne.runtime.model import Model
from galerne.targets.target import load

WINDOW, CHUNK, CONTEXT = 16, 8, 200
SLIDING, FULL = "sliding_attention", "full_attention"


def save_ministral(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": [SLIDING, FULL, SLIDING],
        "vocab_size": 301,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.1,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    MinistralForCausalLM(MinistralConfig(**{**settings, **changes})).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kinds", [[SLIDING, FULL, SLIDING], [FULL, SLIDING, SLIDING]])
def test_parity_past_the_window(tmp_path: Path, kinds: list[str]) -> None:
    checkpoint = open_checkpoint(save_ministral(tmp_path / "checkpoint", layer_types=kinds))
    bundle = export(checkpoint, recipe.load("fp32"), tmp_path / "bundle", chunk=CHUNK)
    windows = [WINDOW if kind == SLIDING else None for kind in kinds]
    assert list(bundle.manifest.model.layer_windows) == windows
    of_kind = {WINDOW: WINDOW + CHUNK, None: CONTEXT}
    assert bundle.manifest.graph.capacities == tuple(of_kind[window] for window in dict.fromkeys(windows))
    report = verify(bundle, checkpoint)
    assert report.passed, report
    assert max(case.tokens for case in report.cases) > 2 * (WINDOW + CHUNK)


def test_each_kind_has_its_own_ring(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_ministral(tmp_path / "checkpoint"))
    bundle = export(checkpoint, recipe.load("fp32"), tmp_path / "bundle", chunk=CHUNK)
    inputs = {value.name: value for value in onnx.load(bundle.file(GRAPH), load_external_data=False).graph.input}
    slots = [inputs[f"past_key_values.{i}.value"].type.tensor_type.shape.dim[2].dim_param for i in range(3)]
    assert slots == ["cache_slots", "cache_slots_1", "cache_slots"]
    assert {"write_indices", "write_indices.1"} < inputs.keys()
    rows = Model.open(bundle.path).rows()
    rows.feed([list(range(150))])
    assert rows.capacities == (WINDOW + CHUNK, 200)
    assert [array.shape[2] for array in rows.cache.arrays()] == [24, 24, 200, 200, 24, 24]


def test_the_cpu_engine_takes_two_kinds(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_ministral(tmp_path / "checkpoint"))
    bundle = build(export(checkpoint, recipe.load("fp16"), tmp_path / "bundle", chunk=CHUNK), load("cpu"))
    report = verify(bundle, checkpoint, engine="cpu")
    assert report.passed, report


def test_layer_types_must_fit(tmp_path: Path) -> None:
    folder = save_ministral(tmp_path / "checkpoint")
    config = folder / "config.json"
    config.write_text(config.read_text().replace(FULL, "chunked_attention"))
    with pytest.raises(InputError, match=r"config.json: layer_types: expected a list of 3, each sliding_attention or"):
        export(open_checkpoint(folder), recipe.load("fp32"), tmp_path / "bundle", chunk=CHUNK)
