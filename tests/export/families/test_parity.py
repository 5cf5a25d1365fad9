"""Every family on random checkpoints of random shapes, against transformers' own class."""

import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.verify import verify
from galerne.optimize.builders.build import build
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import GRAPH, Bundle
from galerne.runtime.engines.record import load_record
from galerne.runtime.manifest import Dialect
from galerne.targets.target import load

Settings = dict[str, Any]
Draw = Callable[[random.Random], Settings]

CONTEXT = 190
SLIDING, FULL = "sliding_attention", "full_attention"


def common(rng: random.Random) -> Settings:
    """Sizes that every family's config names alike. Few of them are powers of two."""
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 4])
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([16, 24, 40]),
        "hidden_size": heads * rng.choice([8, 12, 18]),
        "intermediate_size": rng.choice([48, 97, 130]),
        "num_hidden_layers": rng.choice([2, 3]),
        "vocab_size": rng.choice([101, 203, 320]),
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "tie_word_embeddings": rng.random() < 0.5,
        "initializer_range": 0.1,  # wider than usual: attention that is not flat, so that a lost window shows
        "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice([1e4, 1e6])},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


def scaled(rng: random.Random, kind: str) -> Settings:
    numbers = {
        "linear": {"factor": 4.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {"factor": 4.0},
    }[kind]
    if kind != "linear":
        numbers["original_max_position_embeddings"] = rng.choice([32, 64])
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **numbers}}


def llama(rng: random.Random) -> Settings:
    return {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}


def interleaved(rng: random.Random) -> Settings:
    """Layers of both kinds, in an order of chance."""
    kinds = [SLIDING, FULL, rng.choice([SLIDING, FULL]), rng.choice([SLIDING, FULL])]
    rng.shuffle(kinds)
    return {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": rng.choice([9, 16, 21])}


def windowed_qwen(rng: random.Random) -> Settings:
    return {"use_sliding_window": True, "sliding_window": rng.choice([9, 16]), "max_window_layers": 1}


def phi3(rng: random.Random, **rope: Any) -> Settings:
    heads, head_dim = rng.choice([2, 4]), rng.choice([16, 24])
    partial = rng.choice([0.5, 0.75])
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial, **rope}
    if rope["rope_type"] == "longrope":
        pairs = int(head_dim * partial) // 2
        rope["short_factor"] = [rng.uniform(1, 2) for _ in range(pairs)]
        rope["long_factor"] = [rng.uniform(2, 40) for _ in range(pairs)]
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": head_dim,
        "hidden_size": heads * head_dim,
        "original_max_position_embeddings": 96,
        "sliding_window": rng.choice([None, 20]),
        "rope_parameters": rope,
    }


def mixtral(rng: random.Random) -> Settings:
    return {
        "num_local_experts": rng.choice([3, 4]),
        "num_experts_per_tok": rng.choice([1, 2]),
        "sliding_window": rng.choice([None, 16]),
    }


def gemma(rng: random.Random) -> Settings:
    return {
        **interleaved(rng),
        "query_pre_attn_scalar": rng.choice([20, 48]),
        "attn_logit_softcapping": rng.choice([2.0, 5.0]),
        "final_logit_softcapping": rng.choice([1.0, 3.0]),
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }


def gemma3(rng: random.Random) -> Settings:
    rope = {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    }
    capped = rng.random() < 0.5
    return {
        **gemma(rng),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 2.0 if capped else None,
        "rope_parameters": rope,
    }


# name: the model's class in transformers, its config's class, and what its config says beyond `common`
FAMILIES: dict[str, tuple[str, str, Draw]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", llama),
    "llama-3": ("LlamaForCausalLM", "LlamaConfig", lambda rng: scaled(rng, "llama3")),
    "llama-linear": ("LlamaForCausalLM", "LlamaConfig", lambda rng: scaled(rng, "linear")),
    "mistral-yarn": ("MistralForCausalLM", "MistralConfig", lambda rng: scaled(rng, "yarn") | {"sliding_window": 16}),
    "ministral": ("MinistralForCausalLM", "MinistralConfig", interleaved),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", lambda rng: {}),
    "qwen2-window": ("Qwen2ForCausalLM", "Qwen2Config", windowed_qwen),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", lambda rng: {}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", phi3),
    "phi3-longrope": ("Phi3ForCausalLM", "Phi3Config", lambda rng: phi3(rng, rope_type="longrope")),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", mixtral),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", gemma),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", gemma3),
}


def save(folder: Path, family: str, seed: int) -> Path:
    """Save a random model of a family; norms and biases are random too, so that one left out shows."""
    model_class, config_class, draw = FAMILIES[family]
    rng = random.Random(zlib.crc32(family.encode()) + seed)
    settings = common(rng)
    if config_class == "LlamaConfig" and settings["hidden_size"] % settings["num_attention_heads"]:
        settings["hidden_size"] = 16 * settings["num_attention_heads"]
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**{**settings, **draw(rng)})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
                assert "norm" in name or name.endswith(".bias")
    model.save_pretrained(folder)
    return folder


def check(folder: Path, family: str, seed: int, chunk: int, name: str = "fp32", dialect: Dialect = "opset24") -> Bundle:
    checkpoint = open_checkpoint(save(folder / "checkpoint", family, seed))
    bundle = export(checkpoint, recipe.load(name), folder / "bundle", chunk=chunk, dialect=dialect)
    report = verify(bundle, checkpoint)
    assert report.passed, [case for case in report.cases if not case.passed]
    windows = [window for window in bundle.manifest.model.layer_windows if window is not None]
    if windows:  # some case went past the window and around the ring
        assert max(case.tokens for case in report.cases) > 2 * (max(windows) + chunk)
    if name == "fp32":
        assert max(case.max_abs for case in report.cases if case.max_abs is not None) <= 1e-3
    assert {node.domain for node in graph_of(bundle).node} == {""}
    return bundle


def graph_of(bundle: Bundle) -> onnx.GraphProto:
    return onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph


@pytest.mark.parametrize("family", FAMILIES)
def test_family_matches_its_source(tmp_path: Path, family: str) -> None:
    check(tmp_path, family, seed=0, chunk=7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_shapes_match_their_source(tmp_path: Path, family: str, seed: int) -> None:
    check(tmp_path, family, seed, chunk=5 + 8 * seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_recipes_match_their_source(tmp_path: Path, family: str, name: str) -> None:
    check(tmp_path, family, seed=3, chunk=9, name=name)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_primitive_dialect_matches_too(tmp_path: Path, family: str) -> None:
    check(tmp_path, family, seed=5, chunk=11, dialect="primitive")


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_device")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_for_the_cuda_provider_matches_too(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "checkpoint", family, seed=0))
    bundle = export(checkpoint, recipe.load("fp16"), tmp_path / "bundle", chunk=16)
    target = load("h200")
    report = verify(build(bundle, target, stack=target.stack("onnxruntime-cuda")), checkpoint, engine="h200")
    assert report.passed, [case for case in report.cases if not case.passed]


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize("family", FAMILIES)
def test_tensorrt_rtx_builds_it_ahead_of_time(tmp_path: Path, family: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="lacks tensorrt-rtx-cu13")
    checkpoint = open_checkpoint(save(tmp_path / "checkpoint", family, seed=0))
    bundle = export(checkpoint, recipe.load("fp16"), tmp_path / "bundle", chunk=16)
    target = load("rtx-4090")
    built = build(bundle, target, stack=target.stack("tensorrt-rtx-1.7"))
    assert load_record(built, "rtx-4090").compute_capability == "8.9"


def test_biases_are_fused_as_their_weights_are(tmp_path: Path) -> None:
    bundle = check(tmp_path, "qwen2", seed=4, chunk=16, name="fp16")
    stored = {tensor.name: list(tensor.dims) for tensor in graph_of(bundle).initializer}
    width = stored["model.layers.0.self_attn.qkv_proj.weight"][1]
    assert stored["model.layers.0.self_attn.qkv_proj.bias"] == [width]


def test_the_router_of_experts_is_not_quantized(tmp_path: Path) -> None:
    bundle = check(tmp_path, "mixtral", seed=4, chunk=16, name="int8")
    stored = {tensor.name for tensor in graph_of(bundle).initializer}
    assert "model.layers.0.block_sparse_moe.gate.weight" in stored
    assert "model.layers.0.block_sparse_moe.experts.0.w1_w3_proj.weight_quantized" in stored


def test_longrope_ends_where_the_source_would_rotate_anew(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "checkpoint", "phi3-longrope", seed=0))
    with pytest.raises(InputError, match="--max-context: expected at most 96, found 97"):
        export(checkpoint, recipe.load("fp32"), tmp_path / "bundle", max_context=97)
    assert export(checkpoint, recipe.load("fp32"), tmp_path / "bundle").manifest.graph.max_context == 96


def test_a_tensor_that_would_be_left_out_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoint", "qwen3", seed=0)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("Qwen3ForCausalLM", "LlamaForCausalLM").replace("qwen3", "llama"))
    with pytest.raises(
        InputError, match=r"self_attn.k_norm.weight: no part of a LlamaForCausalLM as its config .* \(\d"
    ):
        export(open_checkpoint(folder), recipe.load("fp32"), tmp_path / "bundle")
