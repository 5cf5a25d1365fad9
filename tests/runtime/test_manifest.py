"""The manifest is read strictly, and the same one always gives the same bytes."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from galerne.errors import InputError
from galerne.runtime.manifest import (
    SCHEMA_VERSION,
    AdapterSlot,
    FileEntry,
    GraphFacts,
    Manifest,
    ModelFacts,
    Source,
    Verdict,
    parse,
)

MANIFEST = Manifest(
    schema_version=SCHEMA_VERSION,
    galerne_version="0.1.0",
    source=Source("safetensors", {"model.safetensors": FileEntry("a" * 64, 10)}),
    model=ModelFacts(
        architecture="MistralForCausalLM",
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=256,
        layer_windows=(32, 32),
        rope_theta=10000.0,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_ids=(2,),
    ),
    graph=GraphFacts("opset24", 24, "float16", chunk=16, capacities=(48,), max_context=None),
    recipe={"weights": {"dtype": "int4", "block_size": 32}, "exclude": ["lm_head"]},
    tools={"torch": "2.13.0"},
    parity={"portable": Verdict(True, "reports/parity-portable.json")},
    files={"model.onnx": FileEntry("b" * 64, 20), "engines/cpu/é.onnx": FileEntry("c" * 64, 0)},
)


def _tree() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(MANIFEST.to_json())
    return tree


def _parse(tree: object) -> Manifest:
    return parse(json.dumps(tree).encode(), "manifest.json")


def test_round_trip_gives_the_same_record_and_bytes() -> None:
    data = MANIFEST.to_json()
    assert parse(data, "manifest.json") == MANIFEST
    assert parse(data, "manifest.json").to_json() == data
    assert data.endswith(b"}\n")


def test_adapter_slots_keep_the_order_of_their_parts() -> None:
    slot = AdapterSlot(8, ("q_proj", "k_proj"), (8, 4))
    graph = dataclasses.replace(MANIFEST.graph, adapter_slots={"qk_proj": slot})
    manifest = dataclasses.replace(MANIFEST, graph=graph)
    assert parse(manifest.to_json(), "manifest.json") == manifest
    assert b"adapter" not in MANIFEST.to_json()
    tree = json.loads(manifest.to_json())
    tree["graph"]["adapter_slots"]["qk_proj"]["out_features"].pop()
    with pytest.raises(InputError, match=r"adapter_slots.qk_proj: out_features: expected 2 of them, found 1"):
        _parse(tree)


def test_bytes_do_not_depend_on_the_order_of_keys() -> None:
    tree = _tree()
    backwards = {key: tree[key] for key in reversed(tree)}
    backwards["files"] = dict(reversed(tree["files"].items()))
    assert _parse(backwards).to_json() == MANIFEST.to_json()


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
NESTED = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(
    st.builds(
        Manifest,
        schema_version=st.just(SCHEMA_VERSION),
        model=st.builds(
            ModelFacts,
            num_hidden_layers=st.just(3),
            layer_windows=st.sampled_from([(4, 4, 4), (None, 4, None)]),
            rope_theta=FINITE,
        ),
        graph=st.builds(GraphFacts, capacities=st.lists(st.integers(), min_size=1, max_size=2).map(tuple)),
        recipe=st.dictionaries(st.text(), NESTED, max_size=3),
    )
)
def test_every_manifest_comes_back(manifest: Manifest) -> None:
    assume(len(manifest.graph.capacities) == len(set(manifest.model.layer_windows)))
    data = manifest.to_json()
    again = parse(data, "m")
    assert again == manifest
    assert again.to_json() == data


def test_null_window_is_not_a_missing_window() -> None:
    tree = _tree()
    tree["model"]["layer_windows"] = [None, None]
    assert _parse(tree).model.layer_windows == (None, None)
    del tree["model"]["layer_windows"]
    with pytest.raises(InputError, match="manifest.json: model: missing key 'layer_windows'"):
        _parse(tree)


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("model", "layer_windows", [32], "model: layer_windows: expected 2 of them, found 1"),
        ("graph", "capacities", [48, 64], "graph: capacities: expected 1 of them, found 2"),
    ],
)
def test_sizes_that_do_not_fit_the_layers(table: str, key: str, value: list[int], message: str) -> None:
    tree = _tree()
    tree[table][key] = value
    with pytest.raises(InputError, match=f"manifest.json: {message}"):
        _parse(tree)


@pytest.mark.parametrize("key", [key for key in json.loads(MANIFEST.to_json()) if key not in ("parity", "files")])
def test_missing_key(key: str) -> None:
    tree = _tree()
    del tree[key]
    with pytest.raises(InputError, match=f"^manifest.json: .*{key}"):
        _parse(tree)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["extra"], 1, "unknown key 'extra'; allowed: schema_version"),
        (["model", "window"], 1, "model: unknown key 'window'"),
        (["model", "hidden_size"], "64", "model: hidden_size: expected an integer, found '64'"),
        (["model", "tie_word_embeddings"], 0, "model: tie_word_embeddings: expected true or false, found 0"),
        (["model", "eos_token_ids"], 2, "model: eos_token_ids: expected a list of an integer, found 2"),
        (["model", "rope_theta"], None, "model: rope_theta: expected a number, found None"),
        (["graph", "dialect"], "opset20", "graph: dialect: expected one of opset24, primitive, found 'opset20'"),
        (["graph", "chunk"], True, "graph: chunk: expected an integer, found True"),
        (["source", "files"], [], "source: files: expected a table, found []"),
        (["files", "model.onnx"], "x", "files.model.onnx: expected a table, found 'x'"),
        (["files", "model.onnx", "size"], 1.0, "files.model.onnx: size: expected an integer, found 1.0"),
        (["parity", "portable", "passed"], "yes", "parity.portable: passed: expected true or false, found 'yes'"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, list) else "",
)
def test_wrong_field_is_named(path: list[str], value: object, message: str) -> None:
    tree = node = _tree()
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(InputError) as caught:
        _parse(tree)
    assert str(caught.value).startswith(f"manifest.json: {message}")


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None])
def test_other_schema_version_says_what_to_do(version: object) -> None:
    tree = {**_tree(), "schema_version": version, "from_the_future": True}
    with pytest.raises(InputError, match=f"schema_version: expected {SCHEMA_VERSION}, found .*export the bundle again"):
        _parse(tree)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"\x80", b"[]", b"null", b'"x"', b"{}"])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="^manifest.json: "):
        parse(data, "manifest.json")
