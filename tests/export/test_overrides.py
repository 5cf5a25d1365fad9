"""A recipe with overrides, through the whole way: graph, bytes, parity, sizes, engines; and what a bad one is answered with."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM

from galerne.cli.main import run
from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.facts import read_facts
from galerne.export.parity.rounding import rounded_like
from galerne.export.parity.verify import verify
from galerne.export.quality.bundle_weights import BundleWeights
from galerne.optimize.builders.build import build
from galerne.optimize.check import check
from galerne.optimize.fit.fit import fit
from galerne.optimize.quantize.recipe import Override, Recipe, WeightFormat, load
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.cpu import ENGINE_GRAPH
from galerne.runtime.engines.record import load_record
from galerne.runtime.footprint import forms_of, stored_products, stored_weight_bytes, weight_names
from galerne.runtime.manifest import Dialect
from galerne.targets import target as targets

# Every kind of neighbour: q and k alike beside a wide v; gate and up apart; a layer that is int8 throughout.
MIXED = """
description = "a mix"
compute = "float16"
weights = { dtype = "int4", block_size = 128 }
lm_head = { dtype = "int4", block_size = 32 }

[[overrides]]
match = "model.layers.0.self_attn.v_proj.weight"
format = { dtype = "float16" }

[[overrides]]
match = "model.layers.0.mlp.up_proj.weight"
format = { dtype = "int8" }

[[overrides]]
match = "model.layers.1.*"
format = { dtype = "int8" }
"""
INT8, WIDE = WeightFormat("int8"), WeightFormat("float16")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "mixed.toml"
    path.write_text(MIXED)
    return path


@pytest.fixture(scope="module")
def mixed_of(
    checkpoint_folder: Path, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Dialect], Bundle]:
    made: dict[Dialect, Bundle] = {}

    def get(dialect: Dialect) -> Bundle:
        if dialect not in made:
            out, source = tmp_path_factory.mktemp("mixed") / dialect, open_checkpoint(checkpoint_folder)
            made[dialect] = export(source, load(str(recipe_file)), out, chunk=8, dialect=dialect)
        return made[dialect]

    return get


def with_overrides(*overrides: tuple[str, WeightFormat]) -> Recipe:
    form = WeightFormat("int4", 32)
    return Recipe("a mix", "float16", form, INT8, overrides=tuple(Override(*override) for override in overrides))


def stored(bundle: Bundle) -> dict[str, int]:
    """Return the type of each weight of the graph, by its initializer's name."""
    graph = onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph
    return {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("dialect", ["opset24", "primitive"])
def test_parity_of_a_mix(mixed_of: Callable[[Dialect], Bundle], checkpoint_folder: Path, dialect: Dialect) -> None:
    bundle = mixed_of(dialect)
    report = verify(bundle, open_checkpoint(checkpoint_folder))
    assert report.passed, [case for case in report.cases if not case.passed]
    assert bundle.manifest.graph.opset == (24 if dialect == "opset24" else 21)
    assert report.against_source.mean_kl < 1.0


def test_each_weight_is_stored_as_the_first_override_says(mixed_of: Callable[[Dialect], Bundle]) -> None:
    kinds, types = onnx.TensorProto, stored(mixed_of("opset24"))
    first, second = "model.layers.0.", "model.layers.1."
    assert types[f"{first}self_attn.qk_proj.weight_quantized"] == kinds.INT4
    assert types[f"{first}self_attn.v_proj.weight"] == kinds.FLOAT16
    assert types[f"{first}mlp.gate_proj.weight_quantized"] == kinds.INT4
    assert types[f"{first}mlp.up_proj.weight_quantized"] == kinds.INT8
    assert types[f"{second}self_attn.qkv_proj.weight_quantized"] == kinds.INT8  # one product, as all are alike
    assert types[f"{second}mlp.gate_up_proj.weight_quantized"] == kinds.INT8
    assert types["lm_head.weight_quantized"] == kinds.INT4


def test_a_mix_has_the_same_bytes_each_time(
    mixed_of: Callable[[Dialect], Bundle], checkpoint_folder: Path, recipe_file: Path, tmp_path: Path
) -> None:
    again = export(open_checkpoint(checkpoint_folder), load(str(recipe_file)), tmp_path / "again", chunk=8, threads=3)
    first = mixed_of("opset24").path
    for file in first.iterdir():
        assert file.read_bytes() == (again.path / file.name).read_bytes(), file.name


def test_the_reference_of_a_part_is_in_the_bundle(
    mixed_of: Callable[[Dialect], Bundle], checkpoint_folder: Path, recipe_file: Path
) -> None:
    """`quality` reads each part out of the product that it is stored in, whatever run that is."""
    bundle, source, recipe = mixed_of("opset24"), open_checkpoint(checkpoint_folder), load(str(recipe_file))
    shapes = {name: tuple(shape) for name, shape in source.shapes().items()}
    weights = BundleWeights(bundle)
    for name in weight_names(bundle.manifest.model):
        found = weights.parameter(name, shapes)
        expected = rounded_like(torch.from_numpy(source.read(name).astype("float32")), name, recipe)
        assert found is not None and torch.equal(found, expected), name


def test_sizes_are_those_of_the_file(mixed_of: Callable[[Dialect], Bundle]) -> None:
    bundle = mixed_of("opset24")
    graph = onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph
    held = sum(
        int(entry.value) for tensor in graph.initializer for entry in tensor.external_data if entry.key == "length"
    )
    assert stored_weight_bytes(bundle.manifest.model, forms_of(bundle.manifest.recipe)) == held
    assert held <= bundle.manifest.files[WEIGHTS].size
    target = targets.load("l4")
    assert (
        fit(bundle.manifest.model, load_mix(bundle), target, target.stack(), context=64).memory_bytes["weights"] == held
    )


def load_mix(bundle: Bundle) -> Recipe:
    from galerne.optimize.quantize.recipe import read_resolved

    recipe = read_resolved(bundle.manifest.recipe, "manifest")
    assert isinstance(recipe, Recipe)
    return recipe


def test_the_cpu_engine_multiplies_packed_weights(checkpoint_folder: Path, recipe_file: Path, tmp_path: Path) -> None:
    source = open_checkpoint(checkpoint_folder)
    bundle = build(export(source, load(str(recipe_file)), tmp_path / "bundle", chunk=8), targets.load("cpu"))
    engine = onnx.load(str(bundle.file(f"engines/cpu/{ENGINE_GRAPH}")), load_external_data=False)
    kinds = [node.op_type for node in engine.graph.node]
    # All but v_proj of layer 0: qk, o, gate, up, down; qkv, o, gate_up, down; and the vocabulary's.
    assert kinds.count("MatMulNBits") == 10 and "DequantizeLinear" not in kinds
    report = verify(bundle, source, engine="cpu")
    assert report.passed and report.arithmetic == "int8 activations"


def test_weights_that_are_fused_in_the_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Phi3Config(
        hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=203, max_position_embeddings=190, sliding_window=16, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "phi3")
    checkpoint = open_checkpoint(tmp_path / "phi3")
    mix = with_overrides(("*.0.*.qkv_proj.weight", WIDE), ("*.1.mlp.gate_up_proj.weight", INT8), ("lm_head.*", WIDE))
    bundle = export(checkpoint, mix, tmp_path / "bundle", chunk=8)
    report = verify(bundle, checkpoint)
    assert report.passed, [case for case in report.cases if not case.passed]
    types = stored(bundle)
    assert types["model.layers.0.self_attn.qkv_proj.weight"] == onnx.TensorProto.FLOAT16
    assert types["model.layers.1.mlp.gate_up_proj.weight_quantized"] == onnx.TensorProto.INT8
    assert not any(name.startswith("lm_head") for name in types)  # wide, it is the embedding's table again
    names_are_the_graph_s(bundle)


def test_experts_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=3, num_experts_per_tok=2, vocab_size=203, sliding_window=16, initializer_range=0.1,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    checkpoint = open_checkpoint(tmp_path / "mixtral")
    mix = with_overrides(("*.experts.1.w3.weight", WIDE), ("model.layers.0.*.experts.2.*", INT8), ("*.k_proj.*", INT8))
    bundle = export(checkpoint, mix, tmp_path / "bundle", chunk=8)
    report = verify(bundle, checkpoint)
    assert report.passed, [case for case in report.cases if not case.passed]
    types, folder = stored(bundle), "model.layers.0.block_sparse_moe.experts"
    assert types[f"{folder}.1.w1.weight_quantized"] == onnx.TensorProto.INT4
    assert types[f"{folder}.1.w3.weight"] == onnx.TensorProto.FLOAT16
    assert types[f"{folder}.2.w1_w3_proj.weight_quantized"] == onnx.TensorProto.INT8
    names_are_the_graph_s(bundle)


def names_are_the_graph_s(bundle: Bundle) -> None:
    """What `fit` takes for a model's products, from the config alone, is as many weights of each size as the graph has."""
    graph = onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    read = {name for node in graph.node if node.op_type in ("MatMul", "DequantizeLinear") for name in node.input[:2]}
    products = sorted(dims for name, dims in shapes.items() if name in read and len(dims) == 2 and "scale" not in name)
    model = bundle.manifest.model
    expected = [[product.rows, product.columns] for product in stored_products(model, forms_of(bundle.manifest.recipe))]
    if model.tie_word_embeddings:  # read as it lies, turned by a Transpose
        expected.remove([model.hidden_size, model.vocab_size])
    assert products == sorted(expected)


def test_adapter_slots_beside_split_products(
    adapt: Callable[..., dict[str, torch.Tensor]], checkpoint_folder: Path, recipe_file: Path, tmp_path: Path
) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    source = open_checkpoint(checkpoint_folder)
    bundle = export(source, load(str(recipe_file)), tmp_path / "bundle", chunk=8, adapter_slots=True)
    slots = bundle.manifest.graph.adapter_slots
    assert {"model.layers.0.self_attn.qk_proj", "model.layers.0.self_attn.v_proj"} <= slots.keys()
    report = verify(bundle, source, adapter=tmp_path / "adapter")
    assert report.passed, [case for case in report.cases if not case.passed]


def test_an_override_that_matches_nothing_is_named(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MIXED + '\n[[overrides]]\nmatch = "model.layers.7.*"\nformat = { dtype = "int8" }\n')
    with pytest.raises(SystemExit) as exited:
        run(["export", str(checkpoint_folder), "--recipe", str(path), "--out", str(tmp_path / "bundle")])
    assert exited.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"overrides: 'model.layers.7.*' matches no weight of {checkpoint_folder}; its weights are named as in " in error
    )
    assert not (tmp_path / "bundle").exists()
    facts, _ = read_facts(str(checkpoint_folder))
    target = targets.load("l4")
    with pytest.raises(InputError, match="matches no weight of this MistralForCausalLM"):
        fit(facts, load(str(path)), target, target.stack(), context=64)
    # No recipe gives a form to a norm, an embedding or a router.
    with pytest.raises(InputError, match=r"'\*norm\.weight' matches no weight"):
        export(open_checkpoint(checkpoint_folder), with_overrides(("*norm.weight", WIDE)), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ('{ dtype = "float32" }', r"overrides\[3\]: format: dtype: expected float16 as in compute"),
        ('{ dtype = "int4" }', r"overrides\[3\]: format: block_size goes with dtype int4"),
        ('{ dtype = "int2" }', r"overrides\[3\]: format: dtype: expected one of"),
    ],
)
def test_a_bad_format_is_named(tmp_path: Path, format: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MIXED + f'\n[[overrides]]\nmatch = "*"\nformat = {format}\n')
    with pytest.raises(InputError, match=message):
        load(str(path))


def test_a_type_of_an_override_that_the_target_lacks_is_refused(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = Recipe("a mix", "float16", INT8, INT8, overrides=(Override("*.1.mlp.down_proj.*", WeightFormat("int4", 32)),))
    bundle = export(open_checkpoint(checkpoint_folder), mix, tmp_path / "bundle", chunk=8)
    target = targets.load("t4")
    found = check(bundle.file(GRAPH), target, target.stack())
    assert [(refusal.node, refusal.found) for refusal in found] == [
        ("/model/layers.1/mlp/down_proj/DequantizeLinear", "int4")
    ]
    assert fit(bundle.manifest.model, mix, target, target.stack(), context=64).missing_types == ("int4",)


def test_inspect_shows_the_mix(mixed_of: Callable[[Dialect], Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["inspect", str(mixed_of("opset24").path), "--json"])
    formats = json.loads(capsys.readouterr().out)["formats"]
    assert formats.keys() == {"int4 in blocks of 128", "int4 in blocks of 32", "int8", "float16"}
    assert formats["float16"] == 128 * 64 * 2
    with pytest.raises(SystemExit):
        run(["inspect", str(mixed_of("opset24").path)])
    assert "float16 16.4 kB" in capsys.readouterr().out


@pytest.mark.tensorrt
def test_tensorrt_rtx_builds_a_mix(checkpoint_folder: Path, recipe_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="lacks tensorrt-rtx-cu13")
    bundle = export(open_checkpoint(checkpoint_folder), load(str(recipe_file)), tmp_path / "bundle", chunk=16)
    target = targets.load("rtx-3090")
    built = build(bundle, target, stack=target.stack("tensorrt-rtx-1.7"))
    assert load_record(built, "rtx-3090").compute_capability == "8.6"
