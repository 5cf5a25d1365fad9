"""The two sides of the comparison."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity import reference
from galerne.export.parity.candidate import poison
from galerne.export.parity.reference import greedy, load, logits_at, round_weights
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.runtime.model import Model

EMBEDDING = "model.embed_tokens.weight"
IDS = np.random.default_rng(3).integers(0, 501, 60)


def test_loads_quietly(mistral: Checkpoint, capfd: pytest.CaptureFixture[str]) -> None:
    model = load(mistral)
    assert capfd.readouterr() == ("", "")
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_blocks_give_what_one_pass_gives(mistral: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model, positions = load(mistral), np.array([0, 15, 16, 31, 32, 47, 59])
    whole = logits_at(model, IDS, positions)
    assert whole.shape == (7, 501)
    monkeypatch.setattr(reference, "_MOST_TOKENS", 16)
    assert np.abs(logits_at(model, IDS, positions) - whole).max() < 1e-5


def test_greedy_follows_the_likeliest(mistral: Checkpoint) -> None:
    model, prompt = load(mistral), IDS[:9]
    for token in greedy(model, prompt, 20):
        assert token == logits_at(model, prompt, np.array([len(prompt) - 1]))[0].argmax()
        prompt = np.append(prompt, token)


def test_rounding_unties_a_quantized_head(llama: Checkpoint) -> None:
    model = load(llama)
    source = model.get_parameter(EMBEDDING).detach().clone()
    round_weights(model, recipe.load("int4-rtn"))
    table, head = model.get_parameter(EMBEDDING), model.get_parameter("lm_head.weight")
    assert torch.equal(table, source.half().float())
    assert not torch.equal(head, table)
    assert len(torch.unique(head[0])) <= 255 and torch.allclose(head, source, atol=float(source.abs().max()) / 127)
    down = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert len(torch.unique(down[0, :32])) <= 16


def test_rounding_keeps_float32_and_ties(llama: Checkpoint) -> None:
    model, untouched = load(llama), load(llama)
    round_weights(model, recipe.load("fp32"))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), untouched.parameters(), strict=True))
    assert model.get_parameter("lm_head.weight") is model.get_parameter(EMBEDDING)


def test_poison_reaches_the_engine(bundle_of: Callable[[str], Bundle]) -> None:
    """What is written into the rings is what the graph reads: with NaN there, no logit is a number."""
    model = Model.open(bundle_of("fp32").path, "portable", exact=True)
    rows = model.rows(1, full_ring=True)
    poison(rows)
    assert all((np.abs(ring) >= 1e3).all() for ring in rows.cache.arrays())
    for ring in rows.cache.arrays():
        ring[...] = np.nan
    assert np.isnan(rows.feed([IDS[:3].tolist()])).all()


def test_kept_positions(bundle_of: Callable[[str], Bundle]) -> None:
    model = Model.open(bundle_of("fp32").path, "portable", exact=True)
    tokens = [IDS[:30].tolist(), IDS[30:35].tolist()]
    whole = model.rows(2).feed_all(tokens)
    kept = model.rows(2).feed_all(tokens, keep=[[0, 7, 8, 29], []])
    assert np.array_equal(kept[0], whole[0][[0, 7, 8, 29]])
    assert kept[1].shape == (0, 501)
