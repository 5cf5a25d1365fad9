"""Checkpoints that were quantized before: the bundle holds their weights as their own libraries read them, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.parity.composed import composed_weights
from galerne.export.parity.verify import verify
from galerne.optimize.builders.build import build
from galerne.runtime.bundle import GRAPH, Bundle
from galerne.runtime.engines.cpu import ENGINE_GRAPH
from galerne.runtime.footprint import forms_of, stored_weight_bytes
from galerne.targets import target

Maker = Callable[..., Any]
Exported = Callable[[Path, Path], Bundle]
# The parts of each fused product, by the product's name.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qk_proj": ("q_proj", "k_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def bundle_weights(bundle: Bundle) -> dict[str, Tensor]:
    """Return the bundle's product weights [out, in] float32, dequantized as ONNX's DequantizeLinear describes it."""
    graph = ir.load(bundle.file(GRAPH)).graph
    found = {}
    for node in graph:
        if node.op_type != "DequantizeLinear":
            continue
        values, scales, *rest = [value.const_value for value in node.inputs if value is not None]
        assert values is not None and scales is not None
        codes, scale = (tensor.numpy().astype(np.float32) for tensor in (values, scales))
        zero = rest[0].numpy().astype(np.float32) if rest and rest[0] is not None else np.zeros_like(scale)
        if "block_size" in node.attributes:
            size = node.attributes["block_size"].as_int()
            scale, zero = (np.repeat(array, size, axis=0) for array in (scale, zero))
        weight = torch.from_numpy((codes - zero) * scale)
        name = str(values.name).removesuffix("_quantized")
        order = graph.initializers.get(f"{name}_order")
        if order is not None:
            restored = torch.empty_like(weight)
            assert order.const_value is not None
            restored[torch.tensor(order.const_value.numpy())] = weight
            weight = restored
        found[name] = weight.t()
    return found


def fused(weights: dict[str, Tensor], name: str) -> Tensor:
    """Return a product's weight from its parts'."""
    prefix, _, module = name.removesuffix(".weight").rpartition(".")
    parts = FUSED.get(module)
    if parts is None:
        return weights[name]
    return torch.cat([weights[f"{prefix}.{part}.weight"] for part in parts])


def check_weights(bundle: Bundle, weights: dict[str, Tensor], products: int = 8) -> None:
    found = bundle_weights(bundle)
    assert len(found) == products
    for name, weight in found.items():
        assert torch.equal(weight, fused(weights, name)), name


def operators(bundle: Bundle) -> list[str]:
    return [node.op_type for node in onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph.node]


def stored_types(bundle: Bundle) -> set[str]:
    graph = onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph
    names = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    return {kind for name, kind in names.items() if name.endswith("_quantized")}


def check_verified(bundle: Bundle, folder: Path) -> None:
    report = verify(bundle, open_checkpoint(folder))
    assert report.passed, [(case.name, case.failures) for case in report.cases if not case.passed]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("group", [32, slow(16)])
def test_awq(make_awq: Maker, exported: Exported, tmp_path: Path, group: int) -> None:
    made = make_awq(tmp_path / "awq", group=group)
    bundle = exported(made.folder, tmp_path / "bundle")
    check_weights(bundle, made.weights)
    assert stored_types(bundle) == {"UINT4"}
    recipe = bundle.manifest.recipe
    assert recipe["method"] == "checkpoint" and recipe["weights"] == {"dtype": "uint4", "block_size": group}
    assert recipe["lm_head"]["dtype"] == "float16" and "AWQ" in recipe["description"]
    check_verified(bundle, made.folder)


def test_awq_of_a_family_with_biases(make_awq: Maker, exported: Exported, tmp_path: Path) -> None:
    """Qwen2's biases stay floats beside the packed weights."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = Qwen2Config(**settings, num_key_value_heads=2, vocab_size=128, max_position_embeddings=128)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "source")
    made = make_awq(tmp_path / "awq", source=tmp_path / "source")
    bundle = exported(made.folder, tmp_path / "bundle")
    check_weights(bundle, made.weights, products=4)
    check_verified(bundle, made.folder)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"symmetric": True}, "INT4"),
        ({"symmetric": False}, "UINT4"),
        slow({"symmetric": True, "group": -1}, "INT4"),
        slow({"symmetric": True, "bits": 8}, "INT8"),
        ({"symmetric": False, "bits": 8, "group": -1}, "UINT8"),
    ],
)
def test_gptq(
    make_gptq: Maker, exported: Exported, tmp_path: Path, options: dict[str, Any], kind: str, version: int
) -> None:
    made = make_gptq(tmp_path / "gptq", version=version, **options)
    bundle = exported(made.folder, tmp_path / "bundle")
    check_weights(bundle, made.weights)
    assert stored_types(bundle) == {kind}
    if version == 1 and kind != "INT4":
        check_verified(bundle, made.folder)


@pytest.mark.parametrize("desc_act", ["shared", "own"])
def test_gptq_act_order(make_gptq: Maker, exported: Exported, tmp_path: Path, desc_act: str) -> None:
    """Where the parts of a fused product share an order it stays one product that reads its input in that order."""
    made = make_gptq(tmp_path / "gptq", desc_act=desc_act, symmetric=False)
    bundle = exported(made.folder, tmp_path / "bundle")
    names = set(bundle_weights(bundle))
    assert ("model.layers.0.self_attn.qkv_proj.weight" in names) == (desc_act == "shared")
    check_weights(bundle, made.weights, products=len(names))
    check_verified(bundle, made.folder)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        slow("int4 groups", "INT4"),
        ("int4 groups asymmetric", "UINT4"),
        ("int4 channels", "INT4"),
        ("int8 groups", "INT8"),
        slow("int8 channels", "INT8"),
        ("int8 channels asymmetric", "UINT8"),
        ("fp8 tensor", "FLOAT8E4M3FN"),
        slow("fp8 channels", "FLOAT8E4M3FN"),
        ("fp8 blocks", "FLOAT8E4M3FN"),
    ],
)
def test_compressed(make_compressed: Maker, exported: Exported, tmp_path: Path, scheme: str, kind: str) -> None:
    """What the library decompresses is rounded to the type of its scales, float16 here; so is what DequantizeLinear gives."""
    made = make_compressed(tmp_path / "compressed", scheme)
    bundle = exported(made.folder, tmp_path / "bundle")
    found = bundle_weights(bundle)
    assert len(found) == 8 and stored_types(bundle) == {kind}
    for name, weight in found.items():
        assert torch.equal(weight.half().float(), fused(made.weights, name)), name
    check_verified(bundle, made.folder)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("int4 groups", torch.bfloat16),
        ("fp8 channels", torch.float32),
        slow("int4 groups", torch.float32),
        slow("int8 channels", torch.bfloat16),
        slow("fp8 channels", torch.bfloat16),
    ],
)
def test_scales_of_another_type(
    make_compressed: Maker, exported: Exported, tmp_path: Path, scheme: str, dtype: torch.dtype
) -> None:
    """Scales that float16 does not hold exactly are stored in float32, and a Cast follows."""
    made = make_compressed(tmp_path / "compressed", scheme, dtype=dtype)
    bundle = exported(made.folder, tmp_path / "bundle")
    for name, weight in bundle_weights(bundle).items():
        assert torch.equal(weight.to(dtype).float(), fused(made.weights, name)), name
    if dtype == torch.float32:
        check_verified(bundle, made.folder)


def test_a_float_beside_its_quantized_neighbours(make_compressed: Maker, exported: Exported, tmp_path: Path) -> None:
    """Where v_proj was left out, q and k stay one product, and v becomes another."""
    made = make_compressed(tmp_path / "compressed", "int4 groups", skip="v_proj")
    bundle = exported(made.folder, tmp_path / "bundle")
    check = bundle_weights(bundle)
    assert {name for name in check if "layers.0.self_attn" in name} == {
        "model.layers.0.self_attn.qk_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
    }
    assert bundle.manifest.recipe["lm_head"]["dtype"] == "int4"
    for name, weight in check.items():
        assert torch.equal(weight.half().float(), fused(made.weights, name)), name
    check_verified(bundle, made.folder)
    # So sizes that are counted from the recipe are those of the file.
    assert [override["match"] for override in bundle.manifest.recipe["overrides"]] == [
        f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(2)
    ]
    graph = onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph
    held = [int(entry.value) for tensor in graph.initializer for entry in tensor.external_data if entry.key == "length"]
    assert stored_weight_bytes(bundle.manifest.model, forms_of(bundle.manifest.recipe)) == sum(held)


@pytest.mark.parametrize("layout", ["awq", "gptq act-order"])
def test_cpu_engine_multiplies_packed_weights(
    make_awq: Maker, make_gptq: Maker, exported: Exported, tmp_path: Path, layout: str
) -> None:
    """ONNX Runtime fuses every product, with zero points and without, into one that reads packed weights."""
    made = make_awq(tmp_path / "made") if layout == "awq" else make_gptq(tmp_path / "made", desc_act="shared")
    bundle = build(exported(made.folder, tmp_path / "bundle"), target.load("cpu"))
    engine = onnx.load(str(bundle.file(f"engines/cpu/{ENGINE_GRAPH}")), load_external_data=False)
    kinds = [node.op_type for node in engine.graph.node]
    assert kinds.count("MatMulNBits") == 8 and "DequantizeLinear" not in kinds
    report = verify(bundle, open_checkpoint(made.folder), engine="cpu")
    assert report.passed and report.arithmetic == "int8 activations"


def test_other_libraries_read_what_is_packed_here(make_awq: Maker, make_gptq: Maker, tmp_path: Path) -> None:
    """The packers of AWQ and GPTQ in conftest.py are held against libraries that read these layouts."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors, which reads AWQ, is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    awq = make_awq(tmp_path / "awq")
    tensors = AutoAWQConverter(group_size=32).process(load_file(awq.folder / "model.safetensors"))
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, weight in awq.weights.items():
        module = name.removesuffix("weight")
        own = {key.removeprefix(module): value for key, value in tensors.items() if key.startswith(module)}
        assert torch.equal(compressor.decompress(own, scheme)["weight"], weight.half()), name


@pytest.mark.parametrize("desc_act", [None, "own"])
def test_gptqmodel_reads_what_is_packed_here(make_gptq: Maker, tmp_path: Path, desc_act: str | None) -> None:
    pytest.importorskip("gptqmodel", reason="gptqmodel, which reads GPTQ, is not installed")
    from gptqmodel.utils.model_dequant import dequantize_model

    made = make_gptq(tmp_path / "gptq", desc_act=desc_act, symmetric=False)
    dequantize_model(made.folder, tmp_path / "dequantized", target_dtype=torch.float32)
    read: dict[str, Tensor] = {}
    for file in (tmp_path / "dequantized").glob("*.safetensors"):
        read |= load_file(file)
    for name, weight in made.weights.items():
        assert torch.equal(read[name], weight), name


def test_reference_is_read_apart_from_the_exporter(
    make_gptq: Maker, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout that the exporter reads wrongly, here a zero point less one, fails verify."""
    made = make_gptq(tmp_path / "gptq", version=1, symmetric=False)
    composed = composed_weights(open_checkpoint(made.folder))
    assert composed is not None
    for name, weight in made.weights.items():
        assert torch.equal(composed[name], weight), name
    with monkeypatch.context() as patch:
        patch.setattr("galerne.export.checkpoint.layout_gptq._FORMATS", {"gptq": 0, "gptq_v2": 0})
        bundle = exported(made.folder, tmp_path / "bundle")
    assert not verify(bundle, open_checkpoint(made.folder)).passed
