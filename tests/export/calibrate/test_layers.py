"""Layers that are run one at a time, and from kept activations, give what the whole model gives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from galerne.export.calibrate.layers import Float32, LayerRun, Layers
from galerne.export.calibrate.source import LayerWeights
from galerne.export.calibrate.statistics import Statistics
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.parity.streamed import StreamedModel

FAMILIES = ["mistral", "llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"]
NORMS = {"gemma2": "pre_feedforward_layernorm", "gemma3": "pre_feedforward_layernorm"}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_pass_on_what_the_whole_model_does(family: str, family_of: Callable[[str], Path]) -> None:
    folder = family_of(family)
    ids = np.random.default_rng(0).integers(3, 2000, (3, 40))
    weights = LayerWeights(open_checkpoint(folder), tied=False)
    layers = Layers(StreamedModel(open_checkpoint(folder), substitute=weights))
    hidden = np.stack([layers.embed(row) for row in ids])
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = whole.model(torch.from_numpy(ids), use_cache=False, output_hidden_states=True)
    for number in range(len(layers.modules)):
        weights.enter(number)
        assert np.abs(hidden - expected.hidden_states[number].numpy()).max() < 1e-4
        groups = layers.groups(number, hidden[0])
        run = LayerRun(layers, number, hidden, lambda _, shape: np.empty(shape, np.float32))
        for group in groups:
            for _ in run.inputs(group):
                pass
        hidden = np.stack(list(run.outputs()))
        run.close()
        assert not any("forward" in vars(module) for module in layers.modules[number].modules())
    normed = layers.final_norm(hidden[0]).numpy()
    assert np.abs(normed - expected.last_hidden_state[0].numpy()).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_products_that_share_an_input_are_found(family: str, family_of: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(family_of(family))
    weights = LayerWeights(checkpoint, tied=False)
    layers = Layers(StreamedModel(checkpoint, substitute=weights))
    hidden = layers.embed(np.arange(3, 30))
    weights.enter(0)
    qkv, output, gate_up, down = layers.groups(0, hidden)
    fused = family == "phi3"
    parts = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
    assert qkv.products == tuple(f"self_attn.{part}" for part in parts)
    assert gate_up.products == (("mlp.gate_up_proj",) if fused else ("mlp.gate_proj", "mlp.up_proj"))
    assert (qkv.norm, gate_up.norm) == ("input_layernorm", NORMS.get(family, "post_attention_layernorm"))
    assert (output.products, output.norm, output.closes) == (("self_attn.o_proj",), None, "self_attn")
    assert (down.products, down.norm, down.closes, down.in_tuple) == (("mlp.down_proj",), None, "mlp", 0)
    assert (qkv.closes, gate_up.closes) == (None, None)


def test_statistics_are_those_of_all_inputs() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 2100)).astype(np.float32) for n in (5, 7)]
    gathered = Statistics(2100, hessian=True, rows=2)
    for part in parts:
        gathered.add(torch.from_numpy(part))
    whole: Float32 = np.concatenate(parts)
    assert gathered.tokens == 12
    factors = rng.uniform(0.5, 2, 2100).astype(np.float32)
    for inputs in (whole, whole / factors):
        if inputs is not whole:
            gathered.divide(factors)
        assert np.allclose(gathered.hessian, inputs.T @ inputs / 12, atol=1e-5)
        assert np.allclose(gathered.max_abs, np.abs(inputs).max(axis=0))
        assert np.allclose(gathered.mean_square, np.square(inputs).mean(axis=0), atol=1e-6)
        assert len(gathered.rows) >= 4
        assert {tuple(row[:3]) for row in gathered.rows} <= {tuple(row[:3]) for row in inputs}
