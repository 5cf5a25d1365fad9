"""Tiny random checkpoints and the bundles made from them, each made once."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle

WINDOW, CHUNK, VOCABULARY = 12, 8, 203


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch on one thread: these models are too small for two, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints and bundles lie."""
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="session")
def mistral(folder: Path) -> Checkpoint:
    """A random Mistral of two layers with a window of 12."""
    return _mistral(folder / "mistral", layers=2)


@pytest.fixture(scope="session")
def shallow(folder: Path) -> Checkpoint:
    """The same with one layer, which is enough to plant a fault in and quicker to export."""
    return _mistral(folder / "shallow", layers=1)


@pytest.fixture(scope="session")
def llama(folder: Path) -> Checkpoint:
    """A random Llama of one layer without a window, its embeddings tied, a sequence ending at 96 tokens."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        initializer_range=0.06,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return open_checkpoint(folder / "llama")


@pytest.fixture(scope="session")
def bundle(folder: Path) -> Callable[[Checkpoint, str], Bundle]:
    """Export a checkpoint with a recipe, or return the bundle that was made of them before."""
    made: dict[tuple[Path, str], Bundle] = {}

    def make(checkpoint: Checkpoint, name: str) -> Bundle:
        key = (checkpoint.path, name)
        if key not in made:
            out = folder / f"{checkpoint.path.name}-{name}"
            made[key] = export(checkpoint, recipe.load(name), out, chunk=CHUNK)
        return made[key]

    return make


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Bundle], Bundle]:
    """Copy a bundle, to be changed."""

    def make(original: Bundle) -> Bundle:
        return dataclasses.replace(original, path=Path(shutil.copytree(original.path, tmp_path / "copy")))

    return make


def _mistral(path: Path, *, layers: int) -> Checkpoint:
    """Write a random Mistral whose attention is sharp enough that a wrong rotation shows."""
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=WINDOW,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        initializer_range=0.06,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )
    MistralForCausalLM(config).save_pretrained(path)
    return open_checkpoint(path)
