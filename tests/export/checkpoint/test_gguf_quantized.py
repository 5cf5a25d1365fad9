"""A GGUF file through GPTQ: a folder whose bundle verifies, and that computes nearly what the file does."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from galerne.export.calibrate.quantize import quantize
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.streamed import StreamedModel
from galerne.export.parity.verify import verify
from galerne.export.prequantized import choose_recipe
from galerne.optimize.quantize import recipe

# One token for each printable character of ASCII but the last, and a pair; byte-level BPE writes space and line feed so.
TOKENS = [*string.ascii_letters, *string.digits, *string.punctuation[:-1], "th", "\u0120", "\u010a"]


@pytest.fixture
def source(tiny_gguf: Any) -> Path:
    """A GGUF file with a tokenizer, its weights of the size that trained ones have."""
    tiny_gguf.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * len(TOKENS),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    for name, values in tiny_gguf.tensors.items():
        if values.ndim == 2:
            tiny_gguf.tensors[name] = values * np.float32(values.shape[1] ** -0.5)
    path: Path = tiny_gguf.write()
    return path


def logits(path: Path, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = StreamedModel(open_checkpoint(path)).model(ids, use_cache=False).logits[0]
    return found


def test_gptq_from_gguf(source: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = tmp_path / "text.txt"
    text.write_text("".join(rng.choice(list(string.ascii_lowercase + " "), 4000)))
    off, ids = {}, torch.from_numpy(rng.integers(0, 26, 64))[None]
    expected = logits(source, ids)
    for method in ("gptq", "nearest"):
        own = tmp_path / f"{method}.toml"
        own.write_text(
            f'description = "for a test"\ncompute = "float16"\nmethod = "{method}"\ncalibration = {{}}\n'
            'weights = { dtype = "int4", block_size = 128 }\nlm_head = { dtype = "int8" }\n'
        )
        chosen = recipe.load("int4-gptq" if method == "gptq" else str(own))
        folder = quantize(open_checkpoint(source), chosen, method, text, tmp_path / method, tokens=2048, length=64)
        off[method] = float((logits(folder, ids) - expected).square().mean().sqrt() / expected.std())
    assert off["gptq"] < 0.5 * off["nearest"] < 0.25, off
    record = json.loads((tmp_path / "gptq" / "galerne.json").read_text())
    assert record["resolved"]["method"] == "gptq"
    assert (record["source"]["format"], list(record["source"]["files"])) == ("gguf", [source.name])
    checkpoint = open_checkpoint(tmp_path / "gptq")
    bundle = export(checkpoint, choose_recipe(checkpoint, None, None), tmp_path / "bundle", chunk=16)
    assert bundle.manifest.recipe["weights"]["dtype"] == "int4"
    report = verify(bundle, checkpoint)
    assert report.passed, [(case.name, case.failures) for case in report.cases if not case.passed]
