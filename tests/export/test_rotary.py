"""Rotary frequencies from real models' settings equal those of transformers."""

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from galerne.errors import InputError
from galerne.export.reader import ConfigReader
from galerne.export.rotary import Rotary, read_rotary

LLAMA_31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
MINISTRAL_YARN = {
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}


def read(config: dict[str, Any], head_dim: int = 128) -> Rotary:
    return read_rotary(ConfigReader(config, "config.json"), head_dim)


@pytest.mark.parametrize(
    ("kind", "theta", "numbers"),
    [
        ("linear", 1e6, {"factor": 8.0}),
        ("llama3", 5e5, LLAMA_31),
        ("llama3", 5e5, {**LLAMA_31, "factor": 32.0}),
        ("yarn", 1e6, QWEN_YARN),
        ("yarn", 1e6, MINISTRAL_YARN),
        ("yarn", 1e4, {**QWEN_YARN, "truncate": False, "attention_factor": 1.5}),
    ],
)
def test_scaled_frequencies_are_those_of_transformers(kind: str, theta: float, numbers: dict[str, Any]) -> None:
    table = {"rope_type": kind, "rope_theta": theta, **numbers}
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=dict(table))
    wanted, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    new = read({"rope_parameters": table})
    old = read({"rope_theta": theta, "rope_scaling": {"type": kind, **numbers}})
    assert new == old
    torch.testing.assert_close(torch.tensor(new.frequencies), wanted, rtol=3e-7, atol=0)
    assert new.scale == pytest.approx(scale, abs=1e-12)
    assert new.theta == theta
    assert new.limit is None


def test_longrope_of_phi_4_mini() -> None:
    rng = random.Random(0)
    factors = {kind: [rng.uniform(1, 60) for _ in range(48)] for kind in ("short_factor", "long_factor")}
    saved: dict[str, Any] = {
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", **factors},
    }
    wanted, scale = ROPE_INIT_FUNCTIONS["longrope"](Phi3Config(**saved), torch.device("cpu"))
    rotary = read(saved)
    assert len(rotary.frequencies) == 48
    torch.testing.assert_close(torch.tensor(rotary.frequencies), wanted, rtol=3e-7, atol=0)
    assert rotary.scale == pytest.approx(scale, abs=1e-12)
    assert rotary.limit == 4096


def test_each_type_of_layer_has_its_own() -> None:
    table = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = ConfigReader({"rope_parameters": table}, "config.json")
    assert read_rotary(config, 64, "sliding_attention") == read({"rope_theta": 1e4}, 64)
    assert read_rotary(config, 64, "full_attention").frequencies[0] == 1 / 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config.json: rope_theta: missing"),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic"}},
            "rope_scaling: rope_type 'dynamic' is not supported",
        ),
        ({"rope_theta": 1e4, "rope_scaling": "linear"}, "rope_scaling: expected a table, found 'linear'"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, "rope_scaling: factor: missing"),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "original_max_position_embeddings: missing",
        ),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.3}, "39 of 130 channels are rotated"),
        (
            {
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0]},
            },
            "short_factor: expected a list of 64 positive numbers",
        ),
    ],
)
def test_what_is_missing_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read({"max_position_embeddings": 64, **config}, head_dim=130 if "partial_rotary_factor" in config else 128)
