"""The primitive dialect: a graph of basic operators, with the parity of the other one."""

import importlib.util
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MinistralConfig, MinistralForCausalLM

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.verify import verify
from galerne.optimize.builders.build import build
from galerne.optimize.graph.uses import uses_of
from galerne.optimize.lower.table import words_for_bytes
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import GRAPH, Bundle
from galerne.runtime.engines.record import load_record
from galerne.targets import operator_table, target

Bundles = Callable[[str], Bundle]
TENSORRT = operator_table.load("tensorrt-10.3")
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 203,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}


def copy(bundle: Bundle, folder: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(bundle.path, folder / "copy")))


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int8", "int4-rtn"])
def test_tensorrt_10_3_lists_all_of_the_graph(primitive_of: Bundles, name: str) -> None:
    bundle = primitive_of(name)
    path = bundle.file(GRAPH)
    onnx.checker.check_model(str(path), full_check=True)
    opset, uses = uses_of(path, words_for_bytes)
    assert (bundle.manifest.graph.dialect, bundle.manifest.graph.opset) == ("primitive", opset)
    assert opset == (21 if name == "int4-rtn" else 20)
    assert operator_table.departures(TENSORRT, opset, uses) == []
    model = onnx.load(str(path), load_external_data=False)
    assert model.ir_version <= 10  # what ONNX 1.16 reads, which that parser is built with
    assert not model.functions


def test_tensorrt_10_3_refuses_the_other_dialect(bundle_of: Bundles) -> None:
    opset, uses = uses_of(bundle_of("int4-rtn").file(GRAPH))
    missing = {item.operator for item in operator_table.departures(TENSORRT, opset, uses) if item.kind == "missing"}
    assert missing == {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}


def test_layers_share_what_they_can(primitive_of: Bundles) -> None:
    _, uses = uses_of(primitive_of("fp32").file(GRAPH))
    count = Counter(use.operator for use in uses)
    assert count["MatMul"] == 2 * (4 + 2) + 1  # of each layer qkv, o, gate_up, down, scores, values; and lm_head
    assert count["ScatterND"] == 2 * 2
    assert count["Shape"] == 3  # B, S and C, once each
    assert count["Expand"] == 3 and count["Cos"] == 1
    assert count["Transpose"] == 2 * (4 + 1)  # of each layer q, k, v, merged heads and keys: no copy of a weight


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4-rtn"])
def test_parity(mistral: Checkpoint, primitive_of: Bundles, name: str) -> None:
    report = verify(primitive_of(name), mistral)
    assert report.passed, [case for case in report.cases if not case.passed]
    assert {"uneven chunks", "rows of different lengths", "poisoned cache", "prompt of 67"} <= {
        case.name for case in report.cases
    }
    if name == "fp32":
        assert max(case.max_abs for case in report.cases if case.max_abs is not None) <= 1e-3
        assert "greedy tokens" in [case.name for case in report.cases]


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_parity_without_a_window(tmp_path: Path, kv_heads: int) -> None:
    """With one key head for all query heads, and with one for each; embeddings tied."""
    torch.manual_seed(1)
    config = LlamaConfig(
        **TINY, num_hidden_layers=1, num_key_value_heads=kv_heads, max_position_embeddings=96, tie_word_embeddings=True
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    checkpoint = open_checkpoint(tmp_path / "llama")
    made = export(checkpoint, recipe.load("fp32"), tmp_path / "bundle", chunk=8, dialect="primitive")
    report = verify(made, checkpoint)
    assert report.passed, [case for case in report.cases if not case.passed]
    assert {case.name for case in report.cases} >= {"greedy tokens", "poisoned cache"}


def test_parity_of_layers_of_two_kinds(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = MinistralConfig(
        **TINY,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=96,
    )
    MinistralForCausalLM(config).save_pretrained(tmp_path / "ministral")
    checkpoint = open_checkpoint(tmp_path / "ministral")
    made = export(checkpoint, recipe.load("fp32"), tmp_path / "bundle", chunk=8, dialect="primitive")
    report = verify(made, checkpoint)
    assert report.passed, [case for case in report.cases if not case.passed]
    opset, uses = uses_of(made.file(GRAPH))
    assert operator_table.departures(TENSORRT, opset, uses) == []


@pytest.mark.parametrize("name", ["fp16", "bf16", "int4-rtn"])
def test_cpu_engine(mistral: Checkpoint, primitive_of: Bundles, tmp_path: Path, name: str) -> None:
    made = build(copy(primitive_of(name), tmp_path), target.load("cpu"))
    report = verify(made, mistral, engine="cpu")
    assert report.passed, [case for case in report.cases if not case.passed]


@pytest.mark.tensorrt
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize(
    ("name", "device"), [("fp32", "a10"), ("fp16", "t4"), ("bf16", "l4"), ("int8", "t4"), ("int4-rtn", "rtx-4090")]
)
def test_tensorrt_rtx_builds_it(primitive_of: Bundles, tmp_path: Path, name: str, device: str) -> None:
    made = build(copy(primitive_of(name), tmp_path), target.load(device))
    # Nothing of the graph but the ring's size and an int8 table is lowered.
    table = {"table": "words"} if name.startswith("int") else {}
    assert load_record(made, device).options == {"capacities": [24], **table}
    assert made.file(f"engines/{device}/engine.plan").stat().st_size > 100_000
