"""GGUF files of other architectures than llama: what transformers makes of them, tensor by tensor and as a whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.verify import verify
from galerne.optimize.quantize import recipe

# What transformers takes for the head's size where it does not read it from the file; None where it does as we do.
HEAD_DIMS = {"qwen2": 16, "qwen3": 128, "gemma3": 256}


def become(tiny_gguf: Any, arch: str) -> None:
    """Turn the tiny llama of 4 and 2 heads, hidden size 64, into a model of another architecture."""
    tiny_gguf.arch, head_dim = arch, HEAD_DIMS[arch]
    tiny_gguf.metadata = {key.replace("llama.", f"{arch}."): value for key, value in tiny_gguf.metadata.items()}
    tiny_gguf.metadata |= {f"{arch}.attention.key_length": head_dim, f"{arch}.rope.dimension_count": head_dim}
    rng = np.random.default_rng(1)

    def add(name: str, *shape: int) -> None:
        tiny_gguf.tensors[f"blk.0.{name}"] = rng.standard_normal(shape).astype(np.float32)

    for name, heads in (("attn_q", 4), ("attn_k", 2), ("attn_v", 2)):
        add(f"{name}.weight", heads * head_dim, 64)
        if arch == "qwen2":
            add(f"{name}.bias", heads * head_dim)
    add("attn_output.weight", 64, 4 * head_dim)
    if arch in ("qwen3", "gemma3"):
        add("attn_q_norm.weight", head_dim)
        add("attn_k_norm.weight", head_dim)
    if arch == "gemma3":
        add("post_attention_norm.weight", 64)
        add("post_ffw_norm.weight", 64)
        tiny_gguf.metadata["gemma3.attention.sliding_window"] = 12
        tiny_gguf.metadata["gemma3.block_count"] = 7
        first = {name: values for name, values in tiny_gguf.tensors.items() if name.startswith("blk.0.")}
        for layer in range(1, 7):
            tiny_gguf.tensors |= {name.replace("blk.0.", f"blk.{layer}."): values for name, values in first.items()}
        del tiny_gguf.tensors["output.weight"]


@pytest.mark.parametrize("arch", HEAD_DIMS)
def test_tensors_equal_transformers(tiny_gguf: Any, arch: str) -> None:
    become(tiny_gguf, arch)
    path: Path = tiny_gguf.write()
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = model.state_dict()
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.shapes()) == set(state) - ({"lm_head.weight"} if arch == "gemma3" else set())
    for name in checkpoint.shapes():
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), state[name].numpy(), err_msg=name)


@pytest.mark.parametrize("arch", HEAD_DIMS)
def test_bundle_matches_transformers(tiny_gguf: Any, tmp_path: Path, arch: str) -> None:
    become(tiny_gguf, arch)
    checkpoint = open_checkpoint(tiny_gguf.write())
    bundle = export(checkpoint, recipe.load("fp32"), tmp_path / "bundle", chunk=7)
    if arch == "gemma3":
        assert bundle.manifest.model.layer_windows == (12,) * 5 + (None, 12)
    report = verify(bundle, checkpoint)
    assert report.passed, report


def test_gemma3_of_27b_is_refused(tiny_gguf: Any) -> None:
    become(tiny_gguf, "gemma3")
    tiny_gguf.metadata["gemma3.block_count"] = 62
    with pytest.raises(InputError, match="27B does not say how scores are scaled; give its safetensors"):
        open_checkpoint(tiny_gguf.write())
