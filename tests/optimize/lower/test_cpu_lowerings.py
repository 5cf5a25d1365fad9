"""The CPU's lowerings change how a graph computes and not what."""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.optimize.lower.group_heads import group_heads
from galerne.optimize.lower.projection_blocks import projection_blocks
from galerne.optimize.lower.single_token import single_token
from galerne.optimize.lower.split_projection import split_projection
from galerne.optimize.lower.widen import widen
from galerne.optimize.quantize import recipe
from galerne.runtime import footprint
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.ort import OrtEngine, session_options
from galerne.runtime.model import Model

Bundles = Callable[[str], Bundle]


def lowered(bundle: Bundle, folder: Path, *lowerings: Callable[[ir.Model], None]) -> Model:
    model = ir.load(bundle.file(GRAPH))
    for lower in lowerings:
        lower(model)
    (folder / WEIGHTS).hardlink_to(bundle.file(WEIGHTS))
    ir.save(model, folder / GRAPH)
    options = session_options(exact=True, threads=None)
    engine = OrtEngine(folder / GRAPH, bundle.manifest, name="lowered", options=options)
    return Model(bundle, engine, 0.0)


def logits(model: Model) -> np.ndarray:
    """Of three rows of different lengths, past the window, in chunks."""
    random = np.random.default_rng(0)
    rows = [random.integers(0, 501, count).tolist() for count in (50, 3, 21)]
    return np.concatenate(model.rows(3).feed_all(rows))


def group(model: ir.Model) -> None:
    group_heads(model, heads=4, kv_heads=2, head_dim=32)


def test_grouped_heads_give_the_same_logits(bundle_of: Bundles, tmp_path: Path) -> None:
    bundle = bundle_of("fp32")
    assert np.allclose(logits(lowered(bundle, tmp_path, group)), logits(Model.open(bundle.path)), atol=1e-4)
    attention = [node for node in ir.load(tmp_path / GRAPH).graph if node.op_type == "Attention"]
    assert len(attention) == 2
    assert all(node.inputs[0].producer().op_type == "Reshape" for node in attention)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["fp16", "int8", "int4-rtn"])
def test_widened_graph_computes_in_float32(bundle_of: Bundles, tmp_path: Path, name: str) -> None:
    bundle = bundle_of(name)
    wide = lowered(bundle, tmp_path, widen)
    assert wide.rows().cache.arrays()[0].dtype == np.float32
    narrow = logits(Model.open(bundle.path, exact=True))
    assert np.abs(logits(wide) - narrow).max() < 0.02 * narrow.std()
    graph = ir.load(tmp_path / GRAPH).graph
    assert Counter(value.dtype for value in (*graph.inputs, *graph.outputs))[ir.DataType.FLOAT16] == 0
    # Stored as it was.
    table, dtype = ("weight", ir.DataType.FLOAT16) if name == "fp16" else ("weight_quantized", ir.DataType.INT8)
    assert graph.initializers[f"model.embed_tokens.{table}"].dtype == dtype


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_single_token_attention_gives_the_same_logits(
    tmp_path: Path, saved_mistral: Callable[..., Path], kv_heads: int
) -> None:
    """In chunks, token by token past the window and the ring, and of rows of different lengths."""
    checkpoint = open_checkpoint(saved_mistral(num_key_value_heads=kv_heads))
    bundle = export(checkpoint, recipe.load("fp32"), tmp_path / "bundle", chunk=8)
    group = functools.partial(group_heads, heads=4, kv_heads=kv_heads, head_dim=32)
    plain, changed = Model.open(bundle.path), lowered(bundle, tmp_path, group, single_token)
    assert np.allclose(logits(changed), logits(plain), atol=1e-4)
    random = np.random.default_rng(1)
    rows, changed_rows = plain.rows(2), changed.rows(2)
    for counts in ((5, 3), *((1, 1),) * 60, (1, 0), (0, 1), (7, 1), (1, 1)):
        tokens = [random.integers(0, 501, count).tolist() for count in counts]
        assert np.allclose(changed_rows.feed(tokens), rows.feed(tokens), atol=1e-4, equal_nan=True)
    kinds = Counter(node.op_type for node in ir.load(tmp_path / GRAPH).graph)
    assert (kinds["If"], kinds["Attention"]) == (2, 0)
    key, value = changed_rows.cache.arrays()[:2]
    assert value.shape == key.shape
    assert (value.strides[2], key.strides[3]) == (4, 4)  # values lie transposed, keys as in the contract


def test_single_token_leaves_attention_without_a_ring_alone(bundle_of: Bundles) -> None:
    model = ir.load(bundle_of("fp32").file(GRAPH))
    for node in model.graph:
        if node.op_type == "TensorScatter":
            node.op_type = "ScatterElements"
    before = [node.op_type for node in model.graph]
    single_token(model)
    assert [node.op_type for node in model.graph] == before


def projection(model: ir.Model) -> ir.Node:
    (node,) = (node for node in model.graph if node.name == "/lm_head/DequantizeLinear")
    return node


def test_the_projection_of_an_int4_model_takes_the_blocks_of_its_layers(bundle_of: Bundles, tmp_path: Path) -> None:
    bundle = bundle_of("int4-rtn")
    blocks = lowered(bundle, tmp_path, lambda model: projection_blocks(model, bundle.manifest.model.vocab_size))
    model = ir.load(tmp_path / GRAPH)
    layer = next(node for node in model.graph if (node.name or "").endswith("qkv_proj/DequantizeLinear"))
    for attribute in ("axis", "block_size"):
        assert projection(model).attributes[attribute].value == layer.attributes[attribute].value
    # The weights are the same.
    plain = logits(Model.open(bundle.path, exact=True))
    assert np.abs(logits(blocks) - plain).max() < 1e-3 * plain.std()


def test_the_projection_of_an_int8_model_stays_as_it_is(bundle_of: Bundles) -> None:
    model = ir.load(bundle_of("int8").file(GRAPH))
    projection_blocks(model, bundle_of("int8").manifest.model.vocab_size)
    assert "block_size" not in projection(model).attributes


@pytest.mark.parametrize("name", ["int8", "int4-rtn"])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_projection_in_parts_gives_the_same_bits(
    bundle_of: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, parts: int
) -> None:
    """With the blocks of the layers and without, and in parts of which the last is smaller."""
    vocab_size = bundle_of(name).manifest.model.vocab_size

    def in_blocks(model: ir.Model) -> None:
        widen(model)
        projection_blocks(model, vocab_size)

    (whole, split) = (tmp_path / "whole", tmp_path / "split")
    for folder in (whole, split):
        folder.mkdir()
    expected = logits(lowered(bundle_of(name), whole, in_blocks))
    monkeypatch.setattr(footprint, "_PART_BYTES", -(-128 * vocab_size // parts))
    model = lowered(bundle_of(name), split, in_blocks, lambda model: split_projection(model, vocab_size))
    assert np.array_equal(logits(model), expected)
    graph = ir.load(split / GRAPH).graph
    assert Counter(node.op_type for node in graph if "split_projection" in (node.name or "")) == {
        "Split": 2,
        "DequantizeLinear": parts,
        "MatMul": parts,
        "Concat": 1,
    }


def test_a_small_projection_stays_whole(bundle_of: Bundles) -> None:
    model = ir.load(bundle_of("int8").file(GRAPH))
    before = [node.op_type for node in model.graph]
    split_projection(model, bundle_of("int8").manifest.model.vocab_size)
    assert [node.op_type for node in model.graph] == before
