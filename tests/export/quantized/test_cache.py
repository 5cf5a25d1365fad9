"""Keys and values that a checkpoint rounds: the rings hold them in int8, and verify proves it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from galerne.errors import InputError
from galerne.export import export as export_module
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.streamed import StreamedModel
from galerne.export.parity.unrounded import cache_rounding
from galerne.export.parity.verify import verify
from galerne.export.prequantized import choose_recipe
from galerne.optimize.builders.build import build
from galerne.optimize.check import check
from galerne.optimize.fit.fit import fit
from galerne.optimize.quantize.cache import CacheScales, round_cache
from galerne.optimize.quantize.recipe import read_resolved
from galerne.runtime.bundle import GRAPH, Bundle
from galerne.runtime.engines import select
from galerne.runtime.engines.cpu import ENGINE_GRAPH
from galerne.runtime.engines.ort import session_options
from galerne.runtime.engines.ort_device import DeviceEngine
from galerne.runtime.model import Model
from galerne.targets import target
from tests.export.quantized.cached import RoundedCache, write_scales
from tests.export.quantized.conftest import Cached

Exported = Callable[[Path, Path], Bundle]


def check_verified(bundle: Bundle, folder: Path, engine: str = "portable") -> None:
    report = verify(bundle, open_checkpoint(folder), engine=engine)
    assert report.passed, [(case.name, case.failures) for case in report.all_cases if not case.passed]
    assert report.arithmetic == "rounded cache" and (report.unrounded is not None) == (engine == "portable")


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 501, count)]


def test_the_reference_computes_what_the_library_does(cached: Cached, checkpoint_folder: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors, whose rounding it is, is not installed")
    model = AutoModelForCausalLM.from_pretrained(checkpoint_folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([tokens(40), tokens(40, 1)])
    with torch.no_grad():
        wanted = model(ids, cache=RoundedCache(model.config, cached.scales)).logits
        ours = StreamedModel(open_checkpoint(cached.folder)).model(ids, use_cache=False).logits
        plain = StreamedModel(open_checkpoint(cached.folder), rounded_inputs=False).model(ids, use_cache=False).logits
    assert (ours - wanted).abs().max() < 1e-5 < 1e-3 < (plain - wanted).abs().max()


def test_verify_proves_it_and_the_scales_are_the_checkpoint_s(cached: Cached) -> None:
    graph = onnx.load(str(cached.bundle.file(GRAPH)), load_external_data=False).graph
    assert cache_rounding(graph) == {
        name.removesuffix("_scale"): ("int", scale.item()) for name, scale in cached.scales.items()
    }
    assert {value.type.tensor_type.elem_type for value in graph.input if "past" in value.name} == {TensorProto.INT8}
    onnx.checker.check_model(str(cached.bundle.file(GRAPH)), full_check=True)
    facts, recipe = cached.bundle.manifest.graph, cached.bundle.manifest.recipe
    assert (facts.rounded_cache, facts.ring_type, facts.compute_type) == ("int8", "int8", "float16")
    assert recipe["cache"] == "int8" and "keys and values in int8 by tensor" in recipe["description"]
    check_verified(cached.bundle, cached.folder)
    assert not list(cached.bundle.path.glob(".verify-*"))


def test_primitive_dialect(cached: Cached, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(cached.folder)
    bundle = export(
        checkpoint, choose_recipe(checkpoint, None, None), tmp_path / "bundle", chunk=8, dialect="primitive"
    )
    onnx.checker.check_model(str(bundle.file(GRAPH)), full_check=True)
    assert bundle.manifest.graph.opset == 20
    check_verified(bundle, cached.folder)


@pytest.fixture(scope="module")
def built(cached: Cached, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    copy = shutil.copytree(cached.bundle.path, tmp_path_factory.mktemp("built") / "bundle")
    return build(Bundle.open(copy), target.load("cpu"))


def test_the_cpu_engine_reads_int8_rings_in_place(cached: Cached, built: Bundle) -> None:
    check_verified(built, cached.folder, "cpu")
    graph = onnx.load(str(built.file(f"engines/cpu/{ENGINE_GRAPH}")), load_external_data=False).graph
    branches = [node for node in graph.node if node.op_type == "If"]
    assert len(branches) == 2
    for branch in branches:
        kinds = {a.name: [node.op_type for node in a.g.node] for a in branch.attribute}
        assert kinds["then_branch"].count("DequantizeLinear") == 2 * 2 and "Attention" not in kinds["then_branch"]
    assert (
        sum(node.op_type == "DequantizeLinear" for node in graph.node)
        == sum(node.op_type == "QuantizeLinear" for node in graph.node) - 4
    )  # none of a ring: what is left turns values before they are rounded
    with Model.open(built.path, "cpu") as model:
        key, value = model.rows().cache.arrays()[:2]
    assert value.strides[2] == key.strides[3] == key.itemsize == 1  # values lie transposed


def test_on_a_device(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(bundle: Bundle, *, exact: bool, threads: int | None) -> DeviceEngine:
        return DeviceEngine(
            bundle.file(GRAPH), bundle.manifest, device="cpu", options=session_options(exact=True, threads=threads)
        )

    monkeypatch.setattr(select, "open_cuda_provider", opened)
    with (
        Model.open(cached.bundle.path, "portable", exact=True) as portable,
        Model.open(cached.bundle.path, "cuda") as model,
    ):
        assert model.engine.ring_dtype == np.int8
        expected, session = portable.session(), model.session()
        for each in (expected, session):
            each.append(tokens(60))
            each.append([3])
        assert np.array_equal(session.logits, expected.logits)


@pytest.mark.parametrize("engine", ["portable", "cpu"])
def test_sessions_move_and_fork_and_go_back(built: Bundle, tmp_path: Path, engine: str) -> None:
    """Past the window and the ring; a session's file holds the rings as they are."""
    with Model.open(built.path, engine) as model:
        session = model.session()
        session.append(tokens(60))
        session.append(tokens(5, 1))
        after = session.logits.copy()
        session.rewind(5)
        fork = session.fork()
        session.append(tokens(5, 1))
        # Runs of five where there were sixty and five: sums of other orders, and the same rounded keys.
        np.testing.assert_allclose(session.logits, after, atol=2e-2)
        fork.save(tmp_path / "session")
        loaded = model.load_session(tmp_path / "session")
        for each in (fork, loaded):
            each.append(tokens(5, 1))
        assert np.array_equal(loaded.logits, fork.logits) and np.array_equal(fork.logits, session.logits)
    held = load_file(tmp_path / "session")["past_key_values.1.key"]
    assert held.dtype == torch.int8 and int(held.abs().max()) > 60


def test_a_session_moves_between_engines(built: Bundle, tmp_path: Path) -> None:
    """Both keep the same int8, whatever they compute in."""
    with Model.open(built.path, "portable") as model:
        session = model.session()
        session.append(tokens(60))
        session.save(tmp_path / "session")
        session.append([7])
    with Model.open(built.path, "cpu") as model:
        loaded = model.load_session(tmp_path / "session")
        loaded.append([7])
    np.testing.assert_allclose(loaded.logits, session.logits, atol=2e-2)


def test_rings_take_a_quarter_of_the_memory_and_a_half_of_the_bandwidth(cached: Cached) -> None:
    manifest = cached.bundle.manifest
    rounded = read_resolved(manifest.recipe, "here")
    plain = read_resolved({key: value for key, value in manifest.recipe.items() if key != "cache"}, "here")
    cpu, gpu = target.load("cpu"), target.load("l4")
    for where, times in ((cpu, 4), (gpu, 2)):
        parts = [
            fit(manifest.model, recipe, where, where.stack(), context=256).memory_bytes for recipe in (plain, rounded)
        ]
        assert parts[0]["cache"] == times * parts[1]["cache"]
    with Model.open(cached.bundle.path) as model:
        assert sum(array.nbytes for array in model.rows(full_ring=True).cache.arrays()) == 2 * 2 * 2 * 24 * 32
    assert fit(manifest.model, rounded, gpu, gpu.stack(), context=256).missing_types == ("a cache in int8",)


@pytest.mark.parametrize(("name", "stack"), [("l4", None), ("jetson-orin-nx-16gb", "jetpack-6.2"), ("t4", None)])
def test_tensorrt_targets_refuse_it_before_any_work(cached: Cached, name: str, stack: str | None) -> None:
    chosen = target.load(name)
    with pytest.raises(
        InputError, match=f"of {name}, as all TensorRT, takes no ring of int8: build it for --target cpu"
    ):
        build(cached.bundle, chosen, stack=chosen.stack(stack))
    assert not cached.bundle.file("engines").exists()
    found = [refusal for refusal in check(cached.bundle.file(GRAPH), chosen, chosen.stack()) if refusal.found == "int8"]
    # JetPack 6's parser has no TensorScatter at all.
    assert {refusal.operator for refusal in found} == (
        {"Shape"} if name.startswith("jetson") else {"Shape", "TensorScatter"}
    )
    assert {refusal.alternative for refusal in found} == {
        "build it for --target cpu, or quantize with a recipe without `cache`"
    }


@pytest.mark.parametrize("fault", ["scale", pytest.param("zero point", marks=pytest.mark.slow)])
def test_planted_faults_are_caught(
    cached: Cached, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A scale that is 0.1 % off is far less than rounding makes of the logits, and shows all the same."""

    def wrong(graph: Any, scales: dict[int, CacheScales]) -> None:
        own = dict(scales)
        own[1] = CacheScales("int8", own[1].key, float(np.float32(own[1].value) * np.float32(1.001)))
        round_cache(graph, own if fault == "scale" else scales)
        if fault == "zero point":
            point = graph.initializers["model.layers.1.self_attn.v_zero_point"]
            point.const_value = type(point.const_value)(np.array(1, np.int8), name=point.name)

    monkeypatch.setattr(export_module, "round_cache", wrong)
    bundle = exported(cached.folder, tmp_path / "bundle")
    report = verify(bundle, open_checkpoint(cached.folder))
    assert not report.passed and report.unrounded is not None
    failures = report.unrounded.cases[0].failures
    assert failures[-1].startswith("model.layers.1.self_attn.v: expected int of 8 bits with the scale ")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("k_scale", lambda _: None, "self_attn.k_scale: missing, but config.json has a kv_cache_scheme"),
        ("v_scale", lambda scale: scale * 0, "self_attn.v_scale: expected one scale above 0, found 0.0"),
        ("k_scale", lambda scale: scale.repeat(2), r"self_attn.k_scale: expected one scale above 0, found shape \[2\]"),
        ("v_scale", lambda scale: scale * float("nan"), "self_attn.v_scale: holds NaN or infinity"),
    ],
)
def test_damaged_scales_are_named(
    cached: Cached, tmp_path: Path, part: str, change: Callable[[Tensor], Tensor | None], message: str
) -> None:
    folder, name = shutil.copytree(cached.folder, tmp_path / "checkpoint"), f"model.layers.1.self_attn.{part}"
    changed = change(cached.scales[name])
    others = {key: scale for key, scale in cached.scales.items() if key != name}
    write_scales(folder, others if changed is None else others | {name: changed})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(InputError, match=message) as caught:
        choose_recipe(checkpoint, None, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", [{"type": "float"}, {"strategy": "attn_head"}, {"symmetric": False}])
def test_another_rounding_of_the_cache_is_left_out_and_said(
    rounded: Callable[[str], Any], tmp_path: Path, scheme: dict[str, Any], cached: Cached
) -> None:
    folder = shutil.copytree(rounded("int8").folder, tmp_path / "checkpoint")
    table = json.loads((folder / "config.json").read_text())
    write_scales(folder, cached.scales, **scheme)
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    table["quantization_config"]["kv_cache_scheme"] = scheme
    (folder / "config.json").write_text(json.dumps(table))
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.cache_scales()
    chosen = choose_recipe(checkpoint, None, None)
    assert chosen.cache is None and "not rounded here as the source rounds them: the cache" in chosen.description


@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.FLOAT8E4M3FN])
def test_whether_onnx_runtime_writes_float8_into_a_ring_is_asked_again(kind: int) -> None:
    """It does not yet: `cache = "fp8"` waits for that."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["new", "scale", "zero"], ["rounded"]),
            helper.make_node("TensorScatter", ["past", "rounded", "write_indices"], ["present"], axis=2),
        ],
        "ring",
        [
            value("new", TensorProto.FLOAT, [1, 2, "S", 8]),
            value("past", kind, [1, 2, "C", 8]),
            value("write_indices", TensorProto.INT64, [1]),
        ],
        [value("present", kind, [1, 2, "C", 8])],
        [helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1]), helper.make_tensor("zero", kind, [], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    if kind == TensorProto.INT8:
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return
    with pytest.raises(Exception, match=r"Could not find an implementation for TensorScatter\(24\)"):
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
