"""Fixtures that many tests share: a small random Mistral checkpoint and the bundles made from it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.utils import logging as transformers_logging

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines import select
from galerne.runtime.engines.ort_cuda import open_ort_cuda
from galerne.runtime.engines.tensorrt.driver import gpu_count

transformers_logging.disable_progress_bar()

WINDOW, CHUNK = 16, 8


def save_mistral(folder: Path, **changes: Any) -> Path:
    """Save a random Mistral that fits in a second of CPU time."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": WINDOW,
        "vocab_size": 501,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,  # wider than usual: attention that is not flat, so that a lost window shows
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    model = MistralForCausalLM(MistralConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def saved_mistral(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a random Mistral whose config has some fields changed."""
    return lambda **changes: save_mistral(tmp_path / "checkpoint", **changes)


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random Mistral: 2 layers, window 16, vocabulary 501."""
    return save_mistral(tmp_path_factory.mktemp("checkpoint") / "mistral")


@pytest.fixture(scope="session")
def bundle_of(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Return the checkpoint's bundle of a recipe; made once, so tests must not change it."""
    made: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        if name not in made:
            out = tmp_path_factory.mktemp("bundles") / name
            made[name] = export(open_checkpoint(checkpoint_folder), recipe.load(name), out, chunk=CHUNK)
        return made[name]

    return get


@pytest.fixture(scope="session")
def primitive_of(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Return the checkpoint's bundle of a recipe in the primitive dialect; made once, so tests must not change it."""
    made: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        if name not in made:
            out, checkpoint = tmp_path_factory.mktemp("primitive") / name, open_checkpoint(checkpoint_folder)
            made[name] = export(checkpoint, recipe.load(name), out, chunk=CHUNK, dialect="primitive")
        return made[name]

    return get


@pytest.fixture(scope="session")
def heavy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose one run of 2,048 tokens takes a core some hundred milliseconds, in which nothing can come between."""
    folder = tmp_path_factory.mktemp("heavy")
    checkpoint = save_mistral(folder / "checkpoint", hidden_size=512, intermediate_size=1024, sliding_window=64)
    return export(open_checkpoint(checkpoint), recipe.load("fp32"), folder / "bundle", chunk=2048)


Adapt = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="session")
def adapt() -> Adapt:
    """Save a random adapter of a checkpoint by peft; return the weights that peft merges, float32."""
    peft = pytest.importorskip("peft", reason="peft, which makes and merges the adapters, is not installed")
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]

    def save(
        base: Path, folder: Path, *, embeddings: bool = False, seed: int = 1, **settings: Any
    ) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": targets} | settings)
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "bias" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(folder, save_embedding_layers=embeddings)
        return {name: tensor.detach() for name, tensor in adapted.merge_and_unload().named_parameters()}

    return save


@pytest.fixture
def on_gpu() -> None:
    """Skip where `--engine cuda` cannot run, and say what it lacks."""
    import onnxruntime as ort

    if not gpu_count():
        pytest.skip("needs an NVIDIA GPU, its driver, and onnxruntime-gpu")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime lacks the CUDA provider: install onnxruntime-gpu in place of onnxruntime")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where engines for ONNX Runtime's CUDA provider run: the GPU, or the CPU provider in its place."""
    if request.param == "cuda":
        request.getfixturevalue("on_gpu")
    monkeypatch.setattr(select, "open_ort_cuda", functools.partial(open_ort_cuda, device=request.param))
    return str(request.param)
