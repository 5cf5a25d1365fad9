"""The embedding table as int32 words gives the rows that the portable graph picks from its bytes."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from galerne.optimize.lower.table import words_for_bytes


def embedding(table: np.ndarray, *, turned: bool) -> onnx.ModelProto:
    """Return a graph that picks rows of a table [V, W], stored as it is or turned, and casts them to float32."""
    stored = np.ascontiguousarray(table.T) if turned else table
    picked = "columns" if turned else "rows"
    nodes = [helper.make_node("Gather", ["table", "ids"], [picked], name="/embed/Gather", axis=int(turned))]
    if turned:
        nodes.append(helper.make_node("Transpose", [picked], ["rows"], perm=[1, 2, 0], name="/embed/Transpose"))
    nodes.append(helper.make_node("Cast", ["rows"], ["x"], to=TensorProto.FLOAT, name="/embed/Cast"))
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "S"])]
    outputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", table.shape[1]])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(stored, "table")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(300, 64), (7, 5), (33, 6)])
@pytest.mark.parametrize("place", ["inside", "first in the file", "later in the file"])
def test_every_row_comes_out_as_it_was(tmp_path: Path, *, turned: bool, shape: tuple[int, int], place: str) -> None:
    table = np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)
    table[0, 0], table[-1, -1] = -128, 127
    model = embedding(table, turned=turned)
    if place != "inside":
        tensor = model.graph.initializer[0]
        before = 0 if place == "first in the file" else 4096
        (tmp_path / "weights.bin").write_bytes(b"\xa5" * before + tensor.raw_data + bytes(4096))
        onnx.external_data_helper.set_external_data(tensor, "weights.bin", before, len(tensor.raw_data))
        tensor.ClearField("raw_data")
    assert words_for_bytes(model.graph)
    assert not any(
        tensor.data_type == TensorProto.INT8 and tensor.name != "table" for tensor in model.graph.initializer
    )
    assert not any("table" in node.input for node in model.graph.node)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    ids = np.stack([np.arange(shape[0]), np.arange(shape[0])[::-1]])
    found = ort.InferenceSession(str(path)).run(None, {"ids": ids})[0]
    assert np.array_equal(found, table[ids])


def test_a_float_table_is_left_alone() -> None:
    model = embedding(np.zeros((4, 4), np.int8), turned=False)
    del model.graph.initializer[:]
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 4), np.float16), "table"))
    before = model.SerializeToString()
    assert not words_for_bytes(model.graph)
    assert model.SerializeToString() == before
