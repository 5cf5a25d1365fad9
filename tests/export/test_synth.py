"""Presets: they are the original's shapes, load in transformers, and give the same bytes on any number of threads."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from galerne.errors import BackendError, InputError
from galerne.export import synth as module
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.preset import preset_config, presets
from galerne.export.synth import synth, tensors_of, write_checkpoint

# Published sizes, in millions of weights.
MILLIONS = {
    "benchmark-1b": 1100,
    "gemma-3-270m": 268,
    "gemma-3-4b": 3880,
    "llama-2-7b": 6738,
    "llama-3.1-8b": 8030,
    "llama-3.2-1b": 1236,
    "ministral-8b": 8020,
    "mistral-7b-v0.1": 7242,
    "mistral-7b-v0.3": 7248,
    "mistral-nemo-12b": 12248,
    "qwen2.5-7b": 7616,
    "qwen3-8b": 8191,
}


def _tiny(preset: str) -> dict[str, Any]:
    """Return a preset's config with two layers, and all that makes it large made small."""
    config = preset_config(preset, 2)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    small = {"vocab_size": 301, "hidden_size": 16 * heads, "intermediate_size": 96, "num_attention_heads": heads}
    return {**config, **small, "num_key_value_heads": kv_heads, "head_dim": 16, "pad_token_id": 0}


def _load(folder: Path) -> Any:
    """Return transformers' own model, and what it says of the keys."""
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)


def test_every_preset_is_known() -> None:
    assert presets() == sorted(MILLIONS)


@pytest.mark.parametrize("preset", MILLIONS)
def test_size_is_the_original_s(preset: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(preset_config(preset)))
    assert round(sum(math.prod(tensor.shape) for tensor in tensors_of(tmp_path)) / 1e6) == MILLIONS[preset]


@pytest.mark.parametrize("preset", MILLIONS)
def test_loads_in_transformers(preset: str, tmp_path: Path) -> None:
    config = _tiny(preset)
    write_checkpoint(config, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == config["architectures"]
    model, told = _load(tmp_path)
    assert type(model).__name__ == config["architectures"][0]
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    with torch.inference_mode():
        out = model(torch.arange(3, 60)[None], output_hidden_states=True)
    spreads = [float(state.std()) for state in out.hidden_states]
    assert 0.5 < float(out.logits.std()) < 2 and spreads[-1] == pytest.approx(1, abs=0.05), spreads


@pytest.mark.slow
@pytest.mark.parametrize("preset", MILLIONS)
def test_two_layers_load_in_transformers(preset: str, tmp_path: Path) -> None:
    synth(preset, tmp_path / "out", layers=2)
    _, told = _load(tmp_path / "out")
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]


def test_same_bytes_on_any_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 1000)
    found = []
    for name, threads, seed in (("one", 1, 0), ("four", 4, 0), ("other", 4, 1)):
        folder = tmp_path / name
        folder.mkdir()
        write_checkpoint(_tiny("qwen3-8b"), folder, seed=seed, threads=threads)
        found.append((folder / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_values_are_normal_and_no_two_tensors_alike(tmp_path: Path) -> None:
    write_checkpoint(_tiny("mistral-7b-v0.1"), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    gate = checkpoint.read("model.layers.0.mlp.gate_proj.weight").astype(np.float32)
    width = gate.shape[1]
    assert gate.std() == pytest.approx(width**-0.5, rel=0.02) and abs(gate.mean()) < 0.01 * gate.std()
    assert np.mean(np.abs(gate) < gate.std()) == pytest.approx(0.683, abs=0.01)
    assert not np.array_equal(gate, checkpoint.read("model.layers.1.mlp.gate_proj.weight"))
    assert (checkpoint.read("model.norm.weight") == 1).all()


def test_shards_are_cut_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _tiny("llama-3.1-8b")
    for name, limit in (("one", 1 << 40), ("many", 1 << 20)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, "_SHARD_BYTES", limit)
        write_checkpoint(config, tmp_path / name)
    whole, cut = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert whole.shapes() == cut.shapes()
    assert all(np.array_equal(whole.read(name), cut.read(name)) for name in whole.shapes())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * math.prod(shape) for shape in cut.shapes().values())


@pytest.mark.parametrize(
    ("preset", "layers", "message"),
    [
        ("mistral-70b", None, "preset 'mistral-70b': unknown; there are benchmark-1b, gemma.*, qwen3-8b"),
        ("gemma-3-270m", 0, "--layers: expected 1 to 18 for gemma-3-270m, found 0"),
        ("gemma-3-270m", 19, "found 19"),
    ],
)
def test_bad_request(preset: str, layers: int | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        synth(preset, tmp_path / "out", layers=layers)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already exists"):
        synth("gemma-3-270m", tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_shard", full)
    with pytest.raises(BackendError, match="no space left"):
        synth("gemma-3-270m", tmp_path / "out", layers=1)
    assert list(tmp_path.iterdir()) == []
