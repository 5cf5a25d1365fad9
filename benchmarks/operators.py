"""Which operators a bundle's `cpu` engine runs its products with: `python -m benchmarks.operators BUNDLE ...`.

The engine is the graph after ONNX Runtime's optimization, and is run as it lies there: its nodes are what runs. It is built into
a bundle that has none.
"""

import argparse
from collections import Counter
from pathlib import Path

import onnx

from benchmarks.models import make_engine
from benchmarks.published import markdown
from galerne.runtime.bundle import ENGINES
from galerne.runtime.engines.cpu import ENGINE_GRAPH

_HEAD = "/lm_head/"
# What else a layer runs is the same whatever the recipe.
_PRODUCTS = frozenset(
    {"MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat"}
) | frozenset({"DynamicQuantizeMatMul", "QGemm", "QLinearMatMul"})
_CONVERSIONS = frozenset({"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "Cast"})


def operators(bundle: Path) -> tuple[str, str, str]:
    """Return the products of the layers, that of the vocabulary, and the nodes that convert types, each as "count operator"."""
    graph = onnx.load(bundle / ENGINES / "cpu" / ENGINE_GRAPH, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    layers: Counter[str] = Counter()
    head: Counter[str] = Counter()
    conversions: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in _CONVERSIONS:
            conversions[node.op_type] += 1
        elif node.op_type in _PRODUCTS and constants.intersection(node.input):  # not attention's, of keys and values
            (head if _HEAD in node.name else layers)[_described(node)] += 1
    return _said(layers), _said(head), _said(conversions)


def _described(node: onnx.NodeProto) -> str:
    given = {each.name: each.i for each in node.attribute}
    if node.op_type != "MatMulNBits":
        return node.op_type
    return f"MatMulNBits of {given['bits']} bits in blocks of {given['block_size']}"


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operators", description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    rows = [["", "layers' products", "vocabulary", "conversions"]]
    for bundle in parser.parse_args().bundles:
        make_engine(bundle, bundle)
        rows.append([bundle.name, *operators(bundle)])
    print(markdown(rows))


if __name__ == "__main__":
    main()
