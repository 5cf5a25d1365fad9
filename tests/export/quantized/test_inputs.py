"""Inputs of products that a checkpoint rounds: the bundle rounds them alike, and verify proves it."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor

from galerne.errors import InputError
from galerne.export import packed_weights
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.streamed import StreamedModel
from galerne.export.parity.unrounded import graph_rounding
from galerne.export.parity.verify import verify
from galerne.export.prequantized import choose_recipe
from galerne.optimize.builders.build import build
from galerne.optimize.quantize.qdq import RoundedInput, round_inputs
from galerne.runtime.bundle import GRAPH, Bundle
from galerne.runtime.engines import ort as ort_engine
from galerne.runtime.engines.cpu import ENGINE_GRAPH
from galerne.runtime.engines.ort import session_options
from galerne.runtime.model import Model
from galerne.targets import target
from tests.export.quantized.compressed import quantize_checkpoint
from tests.export.quantized.conftest import Rounded

Made = Callable[[str], Rounded]
Exported = Callable[[Path, Path], Bundle]
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def graph_of(bundle: Bundle) -> onnx.GraphProto:
    return onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph


def operators(bundle: Bundle) -> list[str]:
    return [node.op_type for node in graph_of(bundle).node]


def check_verified(bundle: Bundle, folder: Path, engine: str = "portable") -> None:
    report = verify(bundle, open_checkpoint(folder), engine=engine)
    assert report.passed, [(case.name, case.failures) for case in report.all_cases if not case.passed]
    assert report.arithmetic == "rounded inputs" and (report.unrounded is not None) == (engine == "portable")


@pytest.mark.parametrize(("name", "kind"), [("int8", "int"), ("float8", "float")])
def test_scales_are_those_of_the_checkpoint(rounded: Made, name: str, kind: str) -> None:
    made = rounded(name)
    tensors = load_file(made.folder / "model.safetensors")
    found = graph_rounding(graph_of(made.bundle))
    assert len(found) == 8
    for weight, (found_kind, scale) in found.items():
        prefix, _, module = weight.removesuffix(".weight").rpartition(".")
        for part in FUSED.get(module, (module,)):
            assert (found_kind, scale) == (kind, tensors[f"{prefix}.{part}.input_scale"].item()), weight
    recipe = made.bundle.manifest.recipe
    assert recipe["activations"] == recipe["weights"]["dtype"]
    assert (
        f"inputs in {recipe['activations']} by tensor" in recipe["description"]
        or "some inputs" in recipe["description"]
    )


@pytest.mark.parametrize("name", ["int8", "float8", "int8, k_proj wider", "mixed"])
def test_the_reference_computes_what_the_library_does(rounded: Made, name: str) -> None:
    made = rounded(name)
    ids = torch.randint(0, 501, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = StreamedModel(open_checkpoint(made.folder)).model(ids).logits
        plain = StreamedModel(open_checkpoint(made.folder), rounded_inputs=False).model(ids).logits
    wanted = made.logits(ids)
    assert (ours - wanted).abs().max() < 1e-5 < 1e-2 < (plain - wanted).abs().max()


@pytest.mark.parametrize("name", ["int8", "float8", slow("int8, k_proj wider"), "mixed"])
def test_verify_proves_it(rounded: Made, name: str) -> None:
    made = rounded(name)
    check_verified(made.bundle, made.folder)
    assert not list(made.bundle.path.glob(".verify-*"))


def test_layers_with_scales_of_their_own_are_taken_apart(rounded: Made) -> None:
    found = graph_rounding(graph_of(rounded("int8, k_proj wider").bundle))
    own = {name.split(".")[-2]: scale for name, (_, scale) in found.items() if "layers.0.self_attn" in name}
    assert set(own) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert own["q_proj"] == own["v_proj"] != own["k_proj"]


def test_groups_of_several_formats(rounded: Made) -> None:
    """Attention in int8 with rounded inputs, the rest in int4 without, the vocabulary projection in int8 with."""
    made = rounded("mixed")
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {weight.split(".")[-2] for weight in graph_rounding(graph_of(made.bundle))} == {
        "qkv_proj",
        "o_proj",
        "lm_head",
    }
    recipe = made.bundle.manifest.recipe
    assert (recipe["weights"]["dtype"], recipe["lm_head"]["dtype"], recipe["activations"]) == ("int4", "int8", "int8")
    assert "some inputs in int8" in recipe["description"]


@pytest.mark.parametrize(("name", "why"), [("int8 dynamic", "dynamic"), slow("int8 asymmetric", "without zero points")])
def test_other_rounding_is_left_out_and_said(rounded: Made, name: str, why: str) -> None:
    made = rounded(name)
    assert "QuantizeLinear" not in operators(made.bundle)
    recipe = made.bundle.manifest.recipe
    assert "activations" not in recipe and "not rounded here" in recipe["description"] and why in recipe["description"]
    report = verify(made.bundle, open_checkpoint(made.folder))
    assert report.passed and report.arithmetic == "float16" and "unrounded" not in json.loads(report.to_json())


def test_primitive_dialect(rounded: Made, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(rounded("int8").folder)
    bundle = export(
        checkpoint, choose_recipe(checkpoint, None, None), tmp_path / "bundle", chunk=8, dialect="primitive"
    )
    onnx.checker.check_model(str(bundle.file(GRAPH)), full_check=True)
    assert bundle.manifest.graph.opset == 20 and operators(bundle).count("QuantizeLinear") == 8
    check_verified(bundle, checkpoint.path)


@pytest.mark.parametrize("dtype", [slow(torch.bfloat16), torch.float32])
def test_scales_of_another_type(
    checkpoint_folder: Path, exported: Exported, tmp_path: Path, dtype: torch.dtype
) -> None:
    quantize_checkpoint(checkpoint_folder, tmp_path / "checkpoint", {"Linear": "int8"}, dtype=dtype)
    bundle = exported(tmp_path / "checkpoint", tmp_path / "bundle")
    scale = load_file(tmp_path / "checkpoint" / "model.safetensors")["model.layers.1.mlp.down_proj.input_scale"]
    assert graph_rounding(graph_of(bundle))["model.layers.1.mlp.down_proj.weight"] == ("int", scale.item())


def _another_scale(rounded: RoundedInput) -> RoundedInput:
    return RoundedInput(rounded.kind, float(np.float32(rounded.scale) * np.float32(1.001)))


@pytest.mark.parametrize("fault", ["scale", slow("missing"), slow("zero point")])
def test_planted_faults_are_caught(
    rounded: Made, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A scale that is 0.1 % off in one product is far less than rounding itself makes of the logits, and shows all the same."""
    folder = rounded("int8").folder

    def wrong(graph: Any, value: Any, how: RoundedInput) -> None:
        if value.name != "model.layers.1.mlp.down_proj.weight":
            round_inputs(graph, value, how)
        elif fault == "scale":
            round_inputs(graph, value, _another_scale(how))
        elif fault == "zero point":
            round_inputs(graph, value, how)
            point = graph.initializers[f"{value.name}_input_zero_point"]
            point.const_value = type(point.const_value)(np.array(1, np.int8), name=point.name)

    monkeypatch.setattr(packed_weights, "round_inputs", wrong)
    bundle = exported(folder, tmp_path / "bundle")
    report = verify(bundle, open_checkpoint(folder))
    assert not report.passed and report.unrounded is not None
    (failure,) = report.unrounded.cases[0].failures
    assert failure.startswith("model.layers.1.mlp.down_proj: expected int of 8 bits with the scale ")
    assert "unrounded" in json.loads(report.to_json())


def test_a_wrong_weight_shows_beneath_the_rounding(
    rounded: Made, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates that are 1 % too large: within what rounded inputs may do to logits, and not within float16's limits."""
    folder = rounded("int8").folder
    real = packed_weights._given

    def given(data: Any) -> Any:
        return real(data * np.float32(1.01)) if data.shape == (1, 320) else real(data)

    monkeypatch.setattr(packed_weights, "_given", given)
    bundle = exported(folder, tmp_path / "bundle")
    report = verify(bundle, open_checkpoint(folder))
    assert all(case.passed for case in report.cases) and not report.passed


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("input_scale", lambda _: None, "up_proj.input_scale: missing, but .*up_proj.* is there"),
        ("input_scale", lambda scale: scale * 0, "up_proj.input_scale: expected one scale above 0, found 0.0"),
        ("input_scale", lambda scale: -scale, "up_proj.input_scale: expected one scale above 0, found -"),
        (
            "input_scale",
            lambda scale: scale.repeat(2),
            r"up_proj.input_scale: expected one scale above 0, found shape \[2\]",
        ),
        ("input_scale", lambda scale: scale * float("nan"), "up_proj.input_scale: holds NaN or infinity"),
        ("input_zero_point", lambda _: torch.ones(1, dtype=torch.int8), "up_proj.input_zero_point: expected 0"),
    ],
)
def test_damaged_scales_are_named(
    rounded: Made,
    exported: Exported,
    tmp_path: Path,
    part: str,
    change: Callable[[Tensor], Tensor | None],
    message: str,
) -> None:
    folder = shutil.copytree(rounded("int8").folder, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{part}"
    changed = change(tensors.pop(name, torch.ones(1)))
    save_file(tensors | ({} if changed is None else {name: changed}), folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        exported(folder, tmp_path / "bundle")
    assert "\n" not in str(caught.value) and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": "Linear"}, "targets: expected a list of names, found 'Linear'"),
        ({"targets": ["re:("]}, "targets: 're:\\(' is no regular expression"),
        ({"input_activations": "int8"}, "input_activations: expected a table, found 'int8'"),
    ],
)
def test_a_group_that_is_not_read_is_named(rounded: Made, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = shutil.copytree(rounded("int8").folder, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_an_input_beyond_float16_is_rounded_from_float32(
    checkpoint_folder: Path, exported: Exported, tmp_path: Path
) -> None:
    """A norm's result beyond 65504, which float16 would make infinite; test_float32_norms shows that no float16 is between."""
    source = shutil.copytree(checkpoint_folder, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"][:4] = 1e6
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            tensors[f"model.layers.0.{part}.weight"][:, :4] *= 1e-6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    folder = tmp_path / "checkpoint"
    quantize_checkpoint(source, folder, {"Linear": "int8"}, dtype=torch.float32)
    for part in ("self_attn.q_proj", "mlp.up_proj"):
        assert 127 * load_file(folder / "model.safetensors")[f"model.layers.0.{part}.input_scale"].item() > 65504
    bundle = exported(folder, tmp_path / "bundle")
    tokens = [np.random.default_rng(0).integers(0, 501, 20).tolist()]
    assert np.isfinite(Model.open(bundle.path, "portable").rows().feed_all(tokens)[0]).all()
    check_verified(bundle, folder)


def test_float32_norms(rounded: Made) -> None:
    """Norms are float32, and QuantizeLinear reads what they give without a step through float16."""
    graph = graph_of(rounded("int8").bundle)
    made = {output: node for node in graph.node for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    quantized = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    producers = [made[node.input[0]].op_type for node in quantized]
    assert sorted(producers) == ["Cast"] * 4 + ["RMSNormalization"] * 4
    for node in graph.node:
        if node.op_type == "RMSNormalization":
            assert types[node.input[1]] == onnx.TensorProto.FLOAT
            (to,) = [attribute.i for attribute in made[node.input[0]].attribute if attribute.name == "to"]
            assert to == onnx.TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.name.endswith("input_scale"):
            assert numpy_helper.to_array(tensor).dtype == np.float32


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8", {"MatMulIntegerToFloat": 8, "QuantizeLinear": 8, "DequantizeLinear": 0}),
        ("mixed", {"MatMulIntegerToFloat": 5, "MatMulNBits": 4, "QuantizeLinear": 5, "DequantizeLinear": 0}),
        ("float8", {"MatMulIntegerToFloat": 0, "MatMulNBits": 0}),  # it has no kernels of its own
    ],
)
def test_what_the_cpu_engine_multiplies(rounded: Made, tmp_path: Path, name: str, expected: dict[str, int]) -> None:
    """ONNX Runtime multiplies int8 by int8 where both sides are rounded, and the engine stays within what rounding does."""
    made = rounded(name)
    bundle = build(Bundle.open(shutil.copytree(made.bundle.path, tmp_path / "bundle")), target.load("cpu"))
    engine = onnx.load(str(bundle.file(f"engines/cpu/{ENGINE_GRAPH}")), load_external_data=False).graph
    kinds = Counter(node.op_type for node in engine.node)
    assert {kind: kinds[kind] for kind in expected} == expected
    check_verified(bundle, made.folder, "cpu")


def test_the_portable_graph_multiplies_int8_by_int8_too(rounded: Made, tmp_path: Path) -> None:
    options = session_options(exact=False, threads=1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(rounded("int8").bundle.file(GRAPH)), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False).graph
    assert Counter(node.op_type for node in graph.node)["MatMulIntegerToFloat"] == 8


def test_cpus_without_vnni_multiply_unsigned_bytes(rounded: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums of unsigned by signed bytes overflow; unsigned by unsigned give the same logits to the last bit but a few."""
    tokens = [np.random.default_rng(0).integers(0, 501, 20).tolist()]
    bundle = rounded("int8").bundle
    usual = Model.open(bundle.path, "portable").rows().feed_all(tokens)[0]
    monkeypatch.setattr(ort_engine, "sums_bytes_exactly", lambda: False)
    assert session_options(exact=False, threads=1).get_session_config_entry("session.x64quantprecision") == "1"
    found = Model.open(bundle.path, "portable").rows().feed_all(tokens)[0]
    np.testing.assert_allclose(found, usual, rtol=0, atol=1e-5)


def test_adapters_read_unrounded_inputs(
    rounded: Made, adapt: Callable[..., Any], checkpoint_folder: Path, tmp_path: Path
) -> None:
    """Beside rounded products an adapter's own products are exact, in the graph and in the reference."""
    adapt(checkpoint_folder, tmp_path / "adapter")
    checkpoint = open_checkpoint(rounded("int8").folder)
    bundle = export(checkpoint, choose_recipe(checkpoint, None, None), tmp_path / "bundle", chunk=8, adapter_slots=True)
    report = verify(bundle, checkpoint, adapter=tmp_path / "adapter")
    assert report.passed, [(case.name, case.failures) for case in report.all_cases if not case.passed]
