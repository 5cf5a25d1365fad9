"""The two sides of the comparison."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.parity import reference
from galerne.export.parity import streamed as streamed_module
from galerne.export.parity.candidate import poison
from galerne.export.parity.cases import Case, Plan
from galerne.export.parity.reference import ReferenceRunner, logits_at
from galerne.export.parity.streamed import StreamedModel
from galerne.export.parity.tolerances import TABLE
from galerne.export.preset import preset_config
from galerne.export.synth import write_checkpoint
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.runtime.model import Model

EMBEDDING = "model.embed_tokens.weight"
IDS = np.random.default_rng(3).integers(0, 501, 60)


def _rounded(checkpoint: Checkpoint, name: str) -> StreamedModel:
    streamed = StreamedModel(checkpoint)
    streamed.rounding = recipe.load(name)
    return streamed


def _whole(checkpoint: Checkpoint) -> Any:
    """Return the model as transformers itself loads it, with its own eager attention."""
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")


def test_opens_quietly(mistral: Checkpoint, capfd: pytest.CaptureFixture[str]) -> None:
    streamed = StreamedModel(mistral)
    assert capfd.readouterr() == ("", "")
    assert type(streamed.model).__name__ == "MistralForCausalLM"


@pytest.mark.parametrize("keep", [0, 1 << 30])
@pytest.mark.parametrize("scores", [1, 1 << 26])
def test_streams_what_transformers_computes(
    mistral: Checkpoint, llama: Checkpoint, monkeypatch: pytest.MonkeyPatch, keep: int, scores: int
) -> None:
    monkeypatch.setattr(streamed_module, "_KEEP_BYTES", keep)
    monkeypatch.setattr(streamed_module, "_MOST_SCORES", scores)
    for checkpoint in (mistral, llama):
        streamed, ids = StreamedModel(checkpoint), torch.from_numpy(IDS[None] % 203)
        with torch.inference_mode():
            found, wanted = streamed.model(ids).logits, _whole(checkpoint)(ids).logits
        assert torch.allclose(found, wanted, atol=1e-6)
        assert all(parameter.is_meta for parameter in streamed.model.parameters())
        assert (len(streamed._kept) > 0) == (keep > 0)


# Families with kinds of layers, scaled rotations and embeddings, norms of queries and keys, biases.
PRESETS = ["gemma-3-4b", "gemma-3-270m", "qwen2.5-7b", "qwen3-8b", "ministral-8b", "llama-3.1-8b"]


@pytest.mark.parametrize("preset", PRESETS)
def test_streams_every_family(preset: str, tmp_path: Path) -> None:
    config = preset_config(preset)
    layers = min(config["num_hidden_layers"], 6)
    config = {**preset_config(preset, layers), "vocab_size": 203, "hidden_size": 16 * config["num_attention_heads"]}
    config |= {"intermediate_size": 96, "head_dim": 16, "pad_token_id": 0, "sliding_window": 8}
    write_checkpoint(config, tmp_path)
    checkpoint, ids = open_checkpoint(tmp_path), torch.from_numpy(IDS[None] % 203)
    with torch.inference_mode():
        found, wanted = StreamedModel(checkpoint).model(ids).logits, _whole(checkpoint)(ids).logits
    assert float(wanted.std()) > 0.3 and torch.allclose(found, wanted, atol=1e-5)


def test_names_that_are_not_transformers_own_are_left_to_it(mistral: Checkpoint, tmp_path: Path) -> None:
    """As in a checkpoint of the bare decoder: transformers adds the prefix, so it loads the model."""
    shutil.copytree(mistral.path, tmp_path / "bare")
    tensors = load_file(tmp_path / "bare" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    streamed = StreamedModel(open_checkpoint(tmp_path / "bare"))
    assert torch.equal(streamed.weight("model.norm.weight"), tensors["model.norm.weight"].float())


def test_what_transformers_cannot_load_is_one_line(mistral: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(mistral.path, tmp_path / "bad")
    config = tmp_path / "bad" / "config.json"
    config.write_text(config.read_text().replace('"mistral"', '"no_such_model"'))
    with pytest.raises(InputError, match="bad: transformers cannot load it"):
        StreamedModel(open_checkpoint(tmp_path / "bad"))


def test_blocks_give_what_one_pass_gives(mistral: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model, positions = StreamedModel(mistral).model, np.array([0, 15, 16, 31, 32, 47, 59])
    whole = logits_at(model, IDS, positions)
    assert whole.shape == (7, 501)
    monkeypatch.setattr(reference, "_MOST_TOKENS", 16)
    assert np.abs(logits_at(model, IDS, positions) - whole).max() < 1e-5


def test_generated_tokens_are_followed(mistral: Checkpoint) -> None:
    """The reference says what comes after each of the candidate's tokens, so one wrong token is one difference."""
    model, prompt = StreamedModel(mistral).model, IDS[:9]
    tokens: list[int] = []
    for _ in range(12):
        fed = np.concatenate([prompt, np.array(tokens, np.int64)])
        tokens.append(int(logits_at(model, fed, np.array([len(fed) - 1]))[0].argmax()))
    case = Case("greedy tokens", ((9,),), greedy_tokens=12)
    plan = Plan((case, Case("prompt of 9", ((9,),))), (IDS,), 16, 24, 501)

    def follow(generated: list[int]) -> list[int]:
        runner = ReferenceRunner(
            mistral,
            recipe.load("fp32"),
            plan,
            lambda: None,
            generated={case.name: np.array(generated)},
            tolerance=TABLE["float32"],
        )
        with runner:
            followed = runner.infer({"case": np.array([0])})["tokens"]
        return [int(token) for token in followed]

    assert follow(tokens) == tokens
    wrong = [*tokens[:5], (tokens[5] + 1) % 501, *tokens[6:]]
    assert follow(wrong)[:6] == tokens[:6]


def test_rounding_unties_a_quantized_head(llama: Checkpoint) -> None:
    """Where the table stays wide; else they go on being one."""
    source = StreamedModel(llama).weight(EMBEDDING)
    streamed = _rounded(llama, "int4-rtn")
    table, head = streamed.weight(EMBEDDING), streamed.weight("lm_head.weight")
    assert torch.equal(head, table)
    streamed.rounding = dataclasses.replace(recipe.load("int4-rtn"), embed_tokens=None)
    table = streamed.weight(EMBEDDING)
    assert torch.equal(table, source.half().float())
    assert torch.equal(head, streamed.weight("lm_head.weight"))
    assert len(torch.unique(head[0])) <= 255 and torch.allclose(head, source, atol=float(source.abs().max()) / 127)
    down = streamed.weight("model.layers.0.mlp.down_proj.weight")
    assert len(torch.unique(down[0, :32])) <= 16


def test_rounding_keeps_float32_and_ties(llama: Checkpoint) -> None:
    untouched, streamed = StreamedModel(llama), _rounded(llama, "fp32")
    names = [name for name, _ in streamed.model.named_parameters()]
    assert all(torch.equal(streamed.weight(name), untouched.weight(name)) for name in names)
    assert torch.equal(streamed.weight("lm_head.weight"), streamed.weight(EMBEDDING))


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
