"""Lowering for TensorRT, which gathers no int8: the embedding table's bytes are read as words of int32, and taken apart."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_BYTES, _BASE, _HALF = 4, 256, 128


def words_for_bytes(graph: onnx.GraphProto) -> bool:
    """Make the rows of an int8 table, or the columns of one that lies turned, picked from int32 words, in place.

    DequantizeLinear before Gather would be taken too, but dequantizes the whole table for each token unless an engine fuses the
    two, which none promises. An element lies in a word of four, low byte first; word and place follow from its number in the
    table.

    Args:
        graph: of the portable model, with or without its external data.
    Returns: whether there was such a table.
    """
    tables = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}
    gathers = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
    for gather in gathers:
        _replace(graph, gather, tables[gather.input[0]])
    return bool(gathers)


def _replace(graph: onnx.GraphProto, gather: onnx.NodeProto, table: TensorProto) -> None:
    axis = next((attribute.i for attribute in gather.attribute if attribute.name == "axis"), 0)
    ids, name = gather.input[1], gather.name
    height, width = table.dims
    words, before = _as_words(table, f"{name}/words")
    # Numbers of the elements [B, S, W] of the picked rows: a row's first, and its other ones from there on.
    row_step, steps = (width, np.arange(width)) if axis == 0 else (1, np.arange(height) * width)
    constants = {
        "row_step": np.array(row_step, np.int64),
        "steps": steps.astype(np.int64) + before,
        "last": np.array([-1], np.int64),
        "bytes": np.array(_BYTES, np.int64),
        "powers": (_BASE ** np.arange(_BYTES)).astype(np.int32),
        "base": np.array(_BASE, np.int32),
        "half": np.array(_HALF, np.int32),
    }
    names = {key: f"{name}/{key}" for key in constants}
    graph.initializer.extend(numpy_helper.from_array(data, names[key]) for key, data in constants.items())
    graph.initializer.append(words)
    picked, users = gather.output[0], [node for node in graph.node if gather.output[0] in node.input]
    if axis:  # the result has its rows in place, so nothing is left to turn
        (turn,) = users
        picked = turn.output[0]
        graph.node.remove(turn)
    steps_of = [
        ("Unsqueeze", ("ids", "last"), "ids_last"),
        ("Mul", ("ids_last", "row_step"), "first"),
        ("Add", ("first", "steps"), "number"),
        ("Div", ("number", "bytes"), "word"),
        ("Mod", ("number", "bytes"), "place"),
        ("Gather", ("words", "word"), "held"),
        ("Gather", ("powers", "place"), "power"),
        ("Mod", ("held", "power"), "below"),
        ("Sub", ("held", "below"), "cleared"),
        ("Div", ("cleared", "power"), "shifted"),  # leaves no rest, so it does not matter how it rounds
        ("Mod", ("shifted", "base"), "unsigned"),  # 0 to 255, also of a negative word
        ("Add", ("unsigned", "half"), "raised"),
        ("Mod", ("raised", "base"), "turned"),
        ("Sub", ("turned", "half"), "value"),
    ]
    names |= {output: f"{name}/{output}" for _, _, output in steps_of}
    names |= {"ids": ids, "words": words.name, "value": picked}
    nodes = [
        helper.make_node(kind, [names[each] for each in inputs], [names[output]], name=f"{name}/{output}")
        for kind, inputs, output in steps_of
    ]
    place = list(graph.node).index(gather)
    graph.node.remove(gather)
    for node in reversed(nodes):
        graph.node.insert(place, node)
    for value in [value for value in graph.value_info if value.name in (picked, gather.output[0])]:
        graph.value_info.remove(value)


def _as_words(table: TensorProto, name: str) -> tuple[TensorProto, int]:
    """Return the bytes of an int8 tensor as int32, and how many bytes come before them there.

    A word's worth before the tensor is taken along where the file has any: TensorRT knows weights by their address, and a
    projection with the same data has another size. After it the file has padding up to the next page, as scales follow.
    """
    size = table.dims[0] * table.dims[1]
    external = {entry.key: entry.value for entry in table.external_data}
    before = _BYTES if int(external.get("offset", 0)) else 0
    words = TensorProto(name=name, data_type=TensorProto.INT32, dims=[-(-(before + size) // _BYTES)])
    if table.data_location == TensorProto.EXTERNAL:
        words.data_location = TensorProto.EXTERNAL
        place = {"offset": int(external.get("offset", 0)) - before, "length": words.dims[0] * _BYTES}
        for key, value in (external | {key: str(number) for key, number in place.items()}).items():
            words.external_data.add(key=key, value=value)
    else:
        data = numpy_helper.to_array(table).tobytes()
        words.raw_data = data + bytes(-len(data) % _BYTES)
    return words, before
