"""GGUF files: every tensor, the config and the tokenizer as transformers loads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from galerne.export.checkpoint.open import open_checkpoint


def load(path: Path) -> dict[str, torch.Tensor]:
    """Return what transformers makes of a GGUF file."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


@pytest.mark.slow
def test_real_tensors_equal_transformers(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    state = load(smollm2)
    assert set(checkpoint.shapes()) == set(state) - {"lm_head.weight"}  # tied
    for name, shape in checkpoint.shapes().items():
        if name.startswith("model.layers.") and not name.startswith(("model.layers.0.", "model.layers.29.")):
            continue
        values = checkpoint.read(name)
        assert values.shape == shape
        assert values.dtype.name == checkpoint.dtype(name) == "float32"
        np.testing.assert_array_equal(values.view(np.uint32), state[name].numpy().view(np.uint32), err_msg=name)


def test_real_config(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    assert checkpoint.format == "gguf"
    assert checkpoint.files() == [smollm2]
    assert checkpoint.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 9.999999747378752e-06,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": None,
    }


def test_real_tokenizer_equals_transformers(smollm2: Path) -> None:
    files = open_checkpoint(smollm2).tokenizer_files()
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in ("The wind of Brittany.", " Galerne\n\n  12345 été 風 🌬️", "<|im_start|>user\nHi<|im_end|>\n", ""):
        ids = theirs.encode(text)
        assert ours.encode(text).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert files["chat_template.jinja"].decode() == theirs.chat_template
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<|im_end|>"


def test_every_stored_type_equals_transformers(tiny_gguf: Any) -> None:
    path = tiny_gguf.write()
    checkpoint = open_checkpoint(path)
    state = load(path)
    assert set(checkpoint.shapes()) == set(state)
    assert not checkpoint.config["tie_word_embeddings"]
    stored = {
        "model.layers.0.self_attn.k_proj.weight": "float16",
        "model.layers.0.self_attn.v_proj.weight": "bfloat16",
    }
    for name in state:
        values = checkpoint.read(name)
        assert values.dtype.name == checkpoint.dtype(name) == stored.get(name, "float32")
        widened = values.astype(np.float32).view(np.uint32)
        np.testing.assert_array_equal(widened, state[name].numpy().view(np.uint32), err_msg=name)


def test_unquantized_tensor_is_a_view_that_survives_release(tiny_gguf: Any) -> None:
    checkpoint = open_checkpoint(tiny_gguf.write())
    values = checkpoint.read("lm_head.weight")
    checkpoint.release("lm_head.weight")
    assert not values.flags.owndata
    np.testing.assert_array_equal(values, tiny_gguf.tensors["output.weight"])


def test_config_of_the_tiny_file(tiny_gguf: Any) -> None:
    del tiny_gguf.metadata["llama.attention.head_count_kv"]
    del tiny_gguf.metadata["llama.rope.dimension_count"]
    del tiny_gguf.tensors["output.weight"]
    tiny_gguf.metadata |= {"llama.attention.sliding_window": 32, "llama.attention.key_length": 16}
    tiny_gguf.tensors["blk.0.attn_q.bias"] = np.zeros(64, np.float32)
    checkpoint = open_checkpoint(tiny_gguf.write())
    found = checkpoint.config
    assert (found["num_key_value_heads"], found["head_dim"], found["sliding_window"]) == (4, 16, 32)
    assert found["tie_word_embeddings"]
    assert found["attention_bias"]
    assert not found["mlp_bias"]
    assert (found["bos_token_id"], found["eos_token_id"]) == (None, None)
    assert "model.layers.0.self_attn.q_proj.bias" in checkpoint.shapes()
    assert checkpoint.tokenizer_files() == {}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}),
        ({"llama.rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"llama.rope.scale_linear": 1.0}, None),
    ],
)
def test_rope_scaling_is_kept(tiny_gguf: Any, metadata: dict[str, object], expected: object) -> None:
    tiny_gguf.metadata |= metadata
    assert open_checkpoint(tiny_gguf.write()).config["rope_scaling"] == expected


def test_rope_factors_are_kept(tiny_gguf: Any) -> None:
    tiny_gguf.tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    checkpoint = open_checkpoint(tiny_gguf.write())
    assert checkpoint.config["rope_scaling"] == {"rope_type": "rope_freqs"}
