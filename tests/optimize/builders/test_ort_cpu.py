"""The `cpu` engine: built, opened without packing again, and refused where it does not fit."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from galerne.errors import BackendError, InputError
from galerne.optimize.builders.build import build
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines.record import RECORD, load_record
from galerne.runtime.engines.select import open_engine
from galerne.runtime.model import Model
from galerne.targets import target

Bundles = Callable[[str], Bundle]


@pytest.fixture
def built(bundle_of: Bundles, tmp_path: Path) -> Bundle:
    copy = shutil.copytree(bundle_of("int4-rtn").path, tmp_path / "bundle")
    return build(Bundle.open(copy), target.load("cpu"))


def test_engine_is_listed_recorded_and_taken_by_default(built: Bundle) -> None:
    record = load_record(built, "cpu")
    assert (record.backend, record.backend_version, record.parity) == ("onnxruntime", ort.__version__, "none")
    assert {f"engines/cpu/{name}" for name in ("engine.onnx", "engine.bin", RECORD)} <= set(built.manifest.files)
    built.verify_hashes()
    assert Model.open(built.path).engine.name == "cpu"


def test_weights_are_packed_on_disk(built: Bundle) -> None:
    graph = onnx.load(str(built.file("engines/cpu/engine.onnx")), load_external_data=False).graph
    products = {node.input[1] for node in graph.node if node.op_type == "MatMulNBits"}
    assert len(products) == 9
    packed = {t.name for t in graph.initializer if any(e.key.startswith("prepacked") for e in t.external_data)}
    assert products <= packed


def test_an_older_onnxruntime_packs_when_it_opens(
    bundle_of: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since 1.31.1 reads back other weights than it saved."""
    monkeypatch.setattr(ort, "__version__", "1.31.1")
    bundle = Bundle.open(Path(shutil.copytree(bundle_of("int4-rtn").path, tmp_path / "bundle")))
    made = build(bundle, target.load("cpu"))
    assert load_record(made, "cpu").options["packed"] is False
    graph = onnx.load(str(made.file("engines/cpu/engine.onnx")), load_external_data=False).graph
    assert not [entry for t in graph.initializer for entry in t.external_data if entry.key.startswith("prepacked")]
    test_engine_agrees_with_the_portable_graph(made)


def test_engine_agrees_with_the_portable_graph(built: Bundle) -> None:
    tokens = [np.random.default_rng(0).integers(0, 501, 60).tolist()]
    portable = Model.open(built.path, "portable").rows().feed_all(tokens)[0]
    engine = Model.open(built.path, "cpu").rows().feed_all(tokens)[0]
    # Both round activations to int8, but after computing in float32 and in float16.
    assert np.sqrt(np.square(engine - portable).mean()) < 0.05 * portable.std()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend_version": "1.0.0"}, f"built for ONNX Runtime 1.0.0, here is {ort.__version__}; rebuild it"),
        ({"cpu_features": ("sve",)}, "built for CPU features sve, here is"),
    ],
)
def test_engine_for_another_machine_gives_way(
    built: Bundle, change: dict[str, object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    record = dataclasses.replace(load_record(built, "cpu"), **change)  # type: ignore[arg-type]
    built.file(f"engines/cpu/{RECORD}").write_bytes(record.to_json())
    changed = built.with_files(
        "engines/cpu", [name for name in built.manifest.files if name.startswith("engines/cpu/")]
    )
    with pytest.raises(BackendError, match=message):
        open_engine(changed, "cpu")
    with caplog.at_level(logging.WARNING):
        assert open_engine(changed).name == "portable"
    assert len(caplog.records) == 1 and message in caplog.text


def test_engine_of_other_weights_is_refused(built: Bundle) -> None:
    record = load_record(built, "cpu")
    record = dataclasses.replace(record, inputs={**record.inputs, "weights.bin": "0" * 64})
    built.file(f"engines/cpu/{RECORD}").write_bytes(record.to_json())
    changed = built.with_files(
        "engines/cpu", [name for name in built.manifest.files if name.startswith("engines/cpu/")]
    )
    with pytest.raises(InputError, match=r"built from weights.bin 000000000000…, but the bundle's is"):
        open_engine(changed, "cpu")


def test_a_second_build_needs_force(built: Bundle) -> None:
    with pytest.raises(InputError, match="has an engine for cpu already; build it anew with --force"):
        build(built, target.load("cpu"))
    assert build(built, target.load("cpu"), force=True).manifest.files.keys() == built.manifest.files.keys()


def test_bfloat16_bundle_runs_through_its_engine(bundle_of: Bundles, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle_of("bf16").path, tmp_path / "bundle")
    build(Bundle.open(copy), target.load("cpu"))
    tokens = [np.random.default_rng(0).integers(0, 501, 40).tolist()]
    wide = Model.open(copy).rows().feed_all(tokens)[0]
    source = Model.open(bundle_of("fp32").path).rows().feed_all(tokens)[0]
    assert np.abs(wide - source).max() < 0.1 * source.std()
