"""The small checkpoints that parity is tested on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.open import open_checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch on one thread: these models are too small for two, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def mistral(checkpoint_folder: Path) -> Checkpoint:
    """The shared random Mistral: 2 layers, window 16, vocabulary 501; `bundle_of` exports it with chunks of 8."""
    return open_checkpoint(checkpoint_folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random Llama of one layer without a window, its embeddings tied, a sequence ending at 96 tokens."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=203,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        initializer_range=0.06,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return open_checkpoint(folder)
