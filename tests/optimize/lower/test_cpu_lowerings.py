"""The CPU's lowerings change how a graph computes and not what."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from galerne.optimize.lower.group_heads import group_heads
from galerne.optimize.lower.widen import widen
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
    assert graph.initializers["model.embed_tokens.weight"].dtype == ir.DataType.FLOAT16  # stored as it was
