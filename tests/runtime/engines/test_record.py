"""Engine records: written the same each time, read strictly, and tied to the bytes that they were built from."""

import dataclasses
import json
from pathlib import Path

import pytest

from galerne.errors import InputError
from galerne.runtime.bundle import Bundle, entry_of
from galerne.runtime.engines.record import EngineRecord, Profile, inputs_of, load_record, parity_of, parse
from galerne.runtime.manifest import SCHEMA_VERSION, GraphFacts, Manifest, ModelFacts, Source

MODEL = ModelFacts("MistralForCausalLM", 1, 8, 16, 2, 1, 4, 32, (16,), 1e4, 64, False, 1, (2,))
GRAPH = GraphFacts("opset24", 24, "float16", 8, (24,), None)


def make_record(inputs: dict[str, str]) -> EngineRecord:
    return EngineRecord(
        schema_version=1,
        target="l4",
        backend="tensorrt_rtx",
        backend_version="1.7.1",
        file="engine.plan",
        compute_capability="8.9",
        cpu_features=None,
        profiles=(Profile("decode", (1, 1, 1), (1, 1, 1)), Profile("prefill", (1, 1, 1), (1, 8, 8))),
        inputs=inputs,
        parity="none",
        options={"capacity": 24},
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of a graph, weights and an engine named l4."""
    for name in ("model.onnx", "weights.bin"):
        (tmp_path / name).write_bytes(name.encode())
    files = {name: entry_of(tmp_path / name) for name in ("model.onnx", "weights.bin")}
    manifest = Manifest(SCHEMA_VERSION, "0", Source("safetensors", {}), MODEL, GRAPH, {}, {}, {}, files)
    (tmp_path / "manifest.json").write_bytes(manifest.to_json())
    bundle = Bundle.open(tmp_path)
    return enter(bundle, make_record(inputs_of(bundle, ("model.onnx", "weights.bin"))))


def enter(bundle: Bundle, record: EngineRecord, file: str = "engine.plan") -> Bundle:
    folder = bundle.path / "engines" / "l4"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engine.json").write_bytes(record.to_json())
    (folder / file).write_bytes(b"plan")
    return bundle.with_files("engines/l4", ["engines/l4/engine.json", f"engines/l4/{file}"])


def test_a_record_survives_the_way_through_its_file() -> None:
    record = make_record({"weights.bin": "b" * 64, "model.onnx": "a" * 64})
    assert parse(record.to_json(), "engine.json") == record
    shuffled = make_record(dict(reversed(record.inputs.items())))
    assert shuffled.to_json() == record.to_json()


def test_a_cpu_record_keeps_its_features() -> None:
    record = dataclasses.replace(make_record({}), compute_capability=None, cpu_features=("avx2", "fma"), profiles=())
    assert parse(record.to_json(), "engine.json") == record


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", 2, "schema_version: expected 1, found 2"),
        ("parity", "maybe", "parity: expected one of passed, failed, none"),
        ("cpu_features", "avx2", "cpu_features: "),
        ("inputs", {"model.onnx": 3}, "inputs.model.onnx: expected a string, found 3"),
        (
            "profiles",
            [{"name": "decode", "batch": [1, 1], "tokens": [1, 1, 1]}],
            r"profiles\[0\]: batch: expected \[min",
        ),
        ("profiles", [{"name": "decode", "batch": [1, 1, 1], "tokens": [4, 2, 8]}], r"tokens: .*found \[4, 2, 8\]"),
        ("surplus", 1, "unknown key 'surplus'"),
    ],
)
def test_a_bad_record_names_its_field(key: str, value: object, message: str) -> None:
    tree = {**json.loads(make_record({}).to_json()), key: value}
    with pytest.raises(InputError, match=message):
        parse(json.dumps(tree).encode(), "engine.json")


def test_a_record_that_is_no_json_is_refused() -> None:
    with pytest.raises(InputError, match=r"engine\.json: not JSON"):
        parse(b"{", "engine.json")


def test_a_fresh_engine_loads(bundle: Bundle) -> None:
    assert load_record(bundle, "l4").profiles[1].tokens == (1, 8, 8)


def test_a_missing_engine_names_those_that_exist(bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"no engine named 't4' in it \(there are: l4\).*galerne build .* --target t4"):
        load_record(bundle, "t4")
    with pytest.raises(InputError, match=r"no engine named 'l4' in it \(it has none\)"):
        load_record(bundle.with_files("engines", []), "l4")


def test_an_engine_of_other_weights_is_stale(bundle: Bundle) -> None:
    before = bundle.manifest.files["weights.bin"].sha256
    (bundle.path / "weights.bin").write_bytes(b"other weights")
    after = entry_of(bundle.path / "weights.bin")
    manifest = dataclasses.replace(bundle.manifest, files={**bundle.manifest.files, "weights.bin": after})
    with pytest.raises(InputError, match=f"{before[:12]}.*{after.sha256[:12]}.*--target l4 --force"):
        load_record(Bundle(bundle.path, manifest), "l4")


def test_a_record_must_name_the_graph_and_a_listed_file(bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"inputs: expected 'model\.onnx' among them"):
        load_record(enter(bundle, make_record({})), "l4")
    outside = dataclasses.replace(make_record(inputs_of(bundle, ("model.onnx",))), file="../../weights.bin")
    with pytest.raises(InputError, match="is not listed; rebuild it"):
        load_record(enter(bundle, outside), "l4")


def test_what_a_builder_records_of_the_bundle(bundle: Bundle) -> None:
    assert parity_of(bundle) == "none"
    assert parity_of(bundle.with_verdict("portable", b"{}", True)) == "passed"
    assert parity_of(bundle.with_verdict("portable", b"{}", False)) == "failed"
    with pytest.raises(InputError, match=r"'extra\.bin' is not listed"):
        inputs_of(bundle, ("extra.bin",))
