"""Engines built ahead of time, without a GPU, from small graphs of the contract."""

import dataclasses
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime import InferenceSession

from galerne.errors import BackendError, InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.optimize.builders.tensorrt import hooks
from galerne.optimize.builders.tensorrt.build_plan import NETWORK
from galerne.optimize.builders.tensorrt.compile import ENGINE, compile_plan
from galerne.optimize.builders.tensorrt.inspect import inspect_engine
from galerne.optimize.builders.tensorrt.library import compute_capability_here
from galerne.optimize.builders.tensorrt.options import Options
from galerne.optimize.builders.tensorrt.plan import plan
from galerne.optimize.lower.tensorrt import lower
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.runtime.manifest import FloatType
from galerne.targets.target import load
from tests.optimize.builders.tensorrt.contract import (
    CAPACITY,
    CHUNK,
    HEAD,
    KV_HEADS,
    LAYERS,
    VOCAB,
    build,
    build_for,
    list_files,
    make_bundle,
)

rtx = pytest.mark.tensorrt


@pytest.fixture(scope="module")
def trt() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX's Python package is not installed")


@rtx
@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize(
    ("compute", "weights", "name"),
    [
        ("float16", "float", "t4"),
        ("float16", "float", "rtx-5090"),
        ("float16", "int4", "l4"),
        ("bfloat16", "float", "a10"),
        ("float32", "float", "a100-80gb"),
    ],
)
def test_a_graph_of_the_contract_builds(tmp_path: Path, compute: FloatType, weights: str, name: str) -> None:
    bundle = make_bundle(tmp_path, compute, weights)
    before = (tmp_path / "model.onnx").read_bytes()
    record, engine = build(bundle, name)
    assert engine.stat().st_size > 100_000
    assert [(profile.name, profile.tokens) for profile in record.profiles] == [
        ("decode", (1, 1, 2)),
        ("prefill", (1, CHUNK, CHUNK)),
    ]
    assert record.inputs == {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    assert record.options == {"capacities": [CAPACITY], "mask": "additive", "attention": "decomposable"}
    assert (record.parity, record.compute_capability) == ("none", load(name).compute_capability)
    assert (tmp_path / "model.onnx").read_bytes() == before, "the lowering leaked into the portable graph"


@rtx
@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("name", ["fp16", "int8", "int4-rtn"])
def test_profiles_share_the_weights(tmp_path: Path, saved_mistral: Callable[..., Path], name: str) -> None:
    checkpoint = saved_mistral(hidden_size=1024, intermediate_size=2048, num_hidden_layers=1)
    bundle = export(open_checkpoint(checkpoint), recipe.load(name), tmp_path / "bundle", chunk=32)
    target = load("rtx-4090")
    made = plan(bundle, target, target.stack("tensorrt-rtx-1.7"), tmp_path, Options(draft=4))
    assert [(p.name, p.tokens, p.logits) for p in made.profiles] == [
        ("decode", (1, 1, 2), (1, 1, 2)),
        ("draft", (1, 5, 5), (1, 5, 5)),
        ("prefill", (1, 32, 32), (1, 1, 32)),
    ]
    sizes = []
    for count in (1, 2, 3):
        some = dataclasses.replace(made, profiles=made.profiles[:count])
        compile_plan(some, tmp_path / NETWORK, bundle.file("weights.bin"), tmp_path)
        sizes.append((tmp_path / ENGINE).stat().st_size)
    # Each profile has its own kernels, about a megabyte a layer; the weights are there once.
    assert sizes[0] > bundle.file("weights.bin").stat().st_size
    assert sizes[1] - sizes[0] < 2e6
    assert sizes[2] - sizes[1] < 2e6


@rtx
@pytest.mark.usefixtures("trt")
def test_a_range_of_batches_builds(tmp_path: Path) -> None:
    record, _ = build(make_bundle(tmp_path), "l4", Options(batch=(1, 2, 8), draft=3))
    assert [(p.name, p.batch) for p in record.profiles] == [
        ("decode", (1, 2, 8)),
        ("draft", (1, 2, 8)),
        ("prefill", (1, 2, 8)),
    ]


@pytest.mark.skipif(compute_capability_here() is not None, reason="this machine has a GPU")
def test_stripping_needs_a_gpu(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    with pytest.raises(BackendError, match=r"--strip: --target l4: TensorRT-RTX compiles on a GPU.*found no GPU"):
        build(bundle, "l4", Options(weights="stripped"))


@rtx
@pytest.mark.usefixtures("trt")
def test_streamed_weights_build(tmp_path: Path) -> None:
    record, engine = build(make_bundle(tmp_path), "l4", Options(weights="streamed"))
    assert record.weights == "streamed"
    assert inspect_engine(engine).size > 100_000


@pytest.mark.parametrize("start", [0, 5 * CAPACITY])
def test_the_lowered_graph_computes_what_the_portable_one_does(tmp_path: Path, start: int) -> None:
    make_bundle(tmp_path, "float32")
    lowered = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert lower(lowered, [CAPACITY] * LAYERS, "float32") == {"mask": "additive", "attention": "decomposable"}
    for node in lowered.graph.node:
        if node.op_type == "Attention":
            # The hint is TensorRT's own; ONNX Runtime refuses what the standard does not list.
            assert node.attribute.pop().name == "TRT_decomposable"
    (tmp_path / "lowered.onnx").write_bytes(lowered.SerializeToString())
    random = np.random.default_rng(1)
    feeds: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": random.integers(0, VOCAB, (1, CHUNK)),
        "position_ids": np.arange(start, start + CHUNK)[None],
        "write_indices": np.array([start % CAPACITY]),
        "logit_indices": np.array([[0, CHUNK - 1]]),
    }
    for i in range(LAYERS):
        for part in ("key", "value"):
            ring = random.standard_normal((1, KV_HEADS, CAPACITY, HEAD))
            feeds[f"past_key_values.{i}.{part}"] = ring.astype(np.float32)
    before, after = (
        InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"]).run(None, feeds)
        for name in ("model.onnx", "lowered.onnx")
    )
    assert len(before) == 1 + 2 * LAYERS
    for expected, found in zip(before, after, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@rtx
@pytest.mark.usefixtures("trt")
def test_a_build_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    bundle = make_bundle(tmp_path)
    for _ in range(2):
        build(bundle, "l4")
    assert capfd.readouterr().out == ""
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("compute", "weights", "message"),
    [
        (
            "float16",
            "int4",
            r"t4 does not take .*int4, expected float16 or int8: .*--precision int8 or fp16.*--stack onnxruntime-cuda",
        ),
        ("bfloat16", "float", "MatMul.*bfloat16, expected float16 or int8"),
        ("float32", "float", "MatMul.*float32, expected float16 or int8"),
    ],
)
def test_a_type_that_the_target_lacks_is_refused_first(
    tmp_path: Path, compute: FloatType, weights: str, message: str
) -> None:
    bundle = make_bundle(tmp_path, compute, weights)
    with pytest.raises(InputError, match=message):
        build(bundle, "t4")
    assert list((tmp_path / "engine").iterdir()) == []


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r"install galerne\[rtx\]"):
        build(make_bundle(tmp_path), "l4")


@rtx
@pytest.mark.usefixtures("trt")
def test_a_capability_that_it_does_not_build_for_is_named(tmp_path: Path) -> None:
    orin = dataclasses.replace(load("l4"), name="orin", compute_capability="8.7")
    with pytest.raises(BackendError, match=r"--target orin: .*builds for compute capability 7\.5, 8\.0.*found 8\.7"):
        build_for(make_bundle(tmp_path), orin)


def change(bundle: Bundle, kind: str, **attributes: object) -> Bundle:
    """Give the first node of a kind other attributes."""
    model = onnx.load(bundle.path / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == kind)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    (bundle.path / "model.onnx").write_bytes(model.SerializeToString())
    return list_files(bundle.path)


@rtx
@pytest.mark.usefixtures("trt")
def test_a_node_that_does_not_parse_is_named_in_one_line(tmp_path: Path) -> None:
    """Sizes that do not go together are beyond what a table of operators knows."""
    bundle = change(make_bundle(tmp_path), "RotaryEmbedding", rotary_embedding_dim=HEAD // 2)
    with pytest.raises(BackendError, match=r"cannot parse /RotaryEmbedding_\d+ \(RotaryEmbedding\): ") as caught:
        build(bundle, "l4")
    assert "\n" not in str(caught.value)


@rtx
@pytest.mark.usefixtures("trt")
def test_what_the_table_refuses_is_named_with_the_alternative_before_anything_is_built(tmp_path: Path) -> None:
    bundle = change(make_bundle(tmp_path), "Attention", softcap=30.0)
    with pytest.raises(
        InputError, match=r"/Attention_\d+: Attention: found attribute softcap = 30.0, .*--dialect prim"
    ):
        build(bundle, "l4")


@rtx
@pytest.mark.usefixtures("trt")
def test_a_failed_build_gives_the_builders_reason(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    # A ring of fewer slots than a chunk cannot take the chunk.
    facts = dataclasses.replace(bundle.manifest.graph, capacities=(CHUNK // 2,))
    bundle = Bundle(bundle.path, dataclasses.replace(bundle.manifest, graph=facts))
    with pytest.raises(BackendError, match=r"--target l4: TensorRT-RTX .* failed to build: .*Error Code") as caught:
        build(bundle, "l4")
    assert "\n" not in str(caught.value)
    assert "CUDA driver" not in str(caught.value)


@rtx
@pytest.mark.usefixtures("trt")
def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    (tmp_path / "engine").mkdir()
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "engine" / ENGINE).symlink_to(full)
    with pytest.raises(BackendError, match="cannot write the engine"):
        build(bundle, "l4")


@rtx
@pytest.mark.usefixtures("trt")
def test_what_is_no_engine_is_told_from_one(tmp_path: Path) -> None:
    _, engine = build(make_bundle(tmp_path), "l4")
    assert inspect_engine(engine).size == engine.stat().st_size
    engine.write_bytes(b"x" * 1000)
    with pytest.raises(BackendError, match="does not take this engine"):
        inspect_engine(engine)
    with pytest.raises(InputError, match="no such engine file"):
        inspect_engine(tmp_path / "none.plan")


@rtx
@pytest.mark.usefixtures("trt")
def test_ctrl_c_cancels_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: hooks.Monitor, phase: str, parent: str | None, steps: int) -> None:
        signal.raise_signal(signal.SIGINT)

    # The signal arrives while TensorRT is at work: at the start of its first phase.
    monkeypatch.setattr(hooks.Monitor, "phase_start", interrupt)
    before = signal.getsignal(signal.SIGINT)
    bundle = make_bundle(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, "l4")
    assert signal.getsignal(signal.SIGINT) is before
