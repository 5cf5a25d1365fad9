"""The exported graph: its operators, names and shapes, and what a bad checkpoint is answered with."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from galerne.errors import InputError
from galerne.export import weights
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.quality.bundle_weights import BundleWeights
from galerne.optimize.quantize import recipe
from galerne.optimize.quantize.rounding import dequantize, round_to
from galerne.optimize.quantize.search import scales_by
from galerne.runtime.bundle import GRAPH, Bundle

Bundles = Callable[[str], Bundle]
# What the contract names; anything else would be a left-over of the tracer.
OPERATORS = {
    *("Add", "And", "Attention", "Cast", "Cos", "DequantizeLinear", "Gather", "GatherND", "Greater", "GreaterOrEqual"),
    *("LessOrEqual", "MatMul", "Mod", "Mul", "RMSNormalization", "Range", "Reshape", "RotaryEmbedding", "Shape"),
    *("Sigmoid", "Sin", "Split", "Squeeze", "Sub", "TensorScatter", "Transpose", "Unsqueeze"),
}


def graph_of(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(str(bundle.file(GRAPH)), load_external_data=False)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int8", "int4-rtn"])
def test_graph_is_standard_fused_and_valid(bundle_of: Bundles, name: str) -> None:
    bundle = bundle_of(name)
    onnx.checker.check_model(str(bundle.file(GRAPH)))
    model = graph_of(bundle)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    count = Counter(node.op_type for node in model.graph.node)
    assert set(count) <= OPERATORS
    assert not model.functions
    assert count["MatMul"] == 2 * 4 + 1  # of each layer qkv, o, gate_up, down; and lm_head
    assert count["Shape"] == 1  # of the ring's capacity, the one size that the graph must ask for
    assert count["DequantizeLinear"] == (9 if name.startswith("int") else 0)


@pytest.mark.parametrize("name", ["int8", "int4-rtn", "int4-search"])
def test_rounded_weights_are_those_of_the_whole_weight(bundle_of: Bundles, checkpoint_folder: Path, name: str) -> None:
    """Bit for bit, though the export sees a weight in tiles."""
    stored, source, own = BundleWeights(bundle_of(name)), open_checkpoint(checkpoint_folder), recipe.load(name)
    for module in ("self_attn.o_proj", "mlp.down_proj"):
        weight = source.read(f"model.layers.1.{module}.weight").astype(np.float32)
        bits = own.weights.bits
        assert bits is not None
        scale = scales_by(own.method, bits)(weight, bits, own.weights.block_for(weight.shape[1], name))
        found = stored.parameter(f"model.layers.1.{module}.weight", {f"model.layers.1.{module}.weight": weight.shape})
        assert found is not None and np.array_equal(found.numpy(), dequantize(round_to(weight, scale, bits), scale))


def test_inputs_and_outputs_are_the_contract(bundle_of: Bundles) -> None:
    graph = graph_of(bundle_of("fp16")).graph

    def shapes(values: Any) -> dict[str, list[str | int]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    cache = ["batch_size", 2, "cache_slots", 32]
    past = {f"past_key_values.{i}.{kind}": cache for i in range(2) for kind in ("key", "value")}
    present = {f"present.{i}.{kind}": cache for i in range(2) for kind in ("key", "value")}
    row = ["batch_size", "sequence_length"]
    assert shapes(graph.input) == {
        "input_ids": row,
        "position_ids": row,
        "write_indices": ["batch_size"],
        "logit_indices": ["batch_size", "num_logits"],
        **past,
    }
    assert shapes(graph.output) == {"logits": ["batch_size", "num_logits", 501], **present}


def test_names_say_the_layer(bundle_of: Bundles) -> None:
    graph = graph_of(bundle_of("int4-rtn")).graph
    names = {node.name for node in graph.node}
    assert {"/model/layers.1/self_attn/qkv_proj/MatMul", "/model/layers.0/mlp/down_proj/DequantizeLinear"} <= names
    assert len(names) == len(graph.node)
    stored = {tensor.name for tensor in graph.initializer}
    assert {"model.layers.0.mlp.gate_up_proj.weight_quantized", "model.embed_tokens.weight_quantized"} <= stored


def test_weights_start_on_pages(bundle_of: Bundles) -> None:
    for tensor in graph_of(bundle_of("int4-rtn")).graph.initializer:
        for entry in tensor.external_data:
            assert entry.key != "offset" or int(entry.value) % 4096 == 0


@pytest.mark.parametrize(
    "name", ["bf16", "int4-rtn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp32", "fp16", "int8"))]
)
def test_same_bytes_on_any_number_of_threads(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With bands and tiles so small that every weight has many, and a vocabulary that no tile divides."""
    for run, (threads, band) in enumerate(((1, 1 << 30), (4, 4096), (4, 4096))):
        monkeypatch.setattr(weights, "_BAND", band)
        monkeypatch.setattr(weights, "_TILE", band // 4)
        export(open_checkpoint(checkpoint_folder), recipe.load(name), tmp_path / str(run), threads=threads)
    files = sorted(path.name for path in (tmp_path / "0").iterdir())
    for again in ("1", "2"):
        assert files == sorted(path.name for path in (tmp_path / again).iterdir())
        for file in files:
            assert (tmp_path / "0" / file).read_bytes() == (tmp_path / again / file).read_bytes(), file
    Bundle.open(tmp_path / "2").verify_hashes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": ...}, "sliding_window: missing; expected an integer or null"),
        ({"rope_parameters": ..., "rope_theta": ...}, "rope_theta: missing; expected a number"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters: factor: missing"),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"\['GPT2LMHeadModel'\] is not supported; supported: .*LlamaForCausalLM, .*MistralForCausalLM",
        ),
        ({"architectures": ...}, "is not supported; supported"),
        ({"hidden_size": "128"}, "hidden_size: expected a positive integer, found '128'"),
        ({"rms_norm_eps": ...}, "rms_norm_eps: missing"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads: 4 is no multiple of num_key_value_heads 3"),
        ({"intermediate_size": 161}, r"mlp.gate_proj.weight: shape \[160, 128\]; expected \[161, 128\]"),
        ({"num_hidden_layers": 3}, "layers.2.*: missing; expected shape"),
    ],
)
def test_bad_config_is_named_and_leaves_nothing(
    checkpoint_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        export(open_checkpoint(folder), recipe.load("fp16"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


def test_output_that_exists_is_kept(checkpoint_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(InputError, match="already exists"):
        export(open_checkpoint(checkpoint_folder), recipe.load("fp16"), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    model = MistralForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = 1e6
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(InputError, match=r"up_proj.* too large for float16; use --precision bf16 or fp32"):
        export(open_checkpoint(tmp_path / "large"), recipe.load("fp16"), tmp_path / "out")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(InputError, match=r"up_proj.weight: holds NaN or infinity"):
        export(open_checkpoint(tmp_path / "nan"), recipe.load("int4-rtn"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
