"""`galerne inspect`: what is in a bundle, and whether its hashes hold."""

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

import typer

from galerne.cli.output import BundlePath, Json, emit, size, table

if TYPE_CHECKING:
    from galerne.runtime.manifest import Manifest


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(inspect)


def inspect(bundle: BundlePath, json: Json = False) -> None:
    """Show what is in a bundle, and check every file's SHA-256."""
    from galerne.runtime.bundle import Bundle
    from galerne.runtime.manifest import layer_kinds

    opened = Bundle.open(bundle)
    opened.verify_hashes()
    manifest = opened.manifest
    formats = _formats(manifest)
    model, graph = manifest.model, manifest.graph
    windows = [
        f"{'none: every key is seen' if window is None else f'{window} tokens'}{_share(model.layer_windows, window)}"
        for window in layer_kinds(model.layer_windows)[0]
    ]
    verdicts = {name: "passed" if verdict.passed else "FAILED" for name, verdict in manifest.parity.items()}
    facts = [
        ["model", f"{model.architecture}, {model.num_hidden_layers} layers, hidden {model.hidden_size}"],
        ["heads", f"{model.num_attention_heads} query, {model.num_key_value_heads} key/value, of {model.head_dim}"],
        ["window", "; ".join(windows)],
        ["graph", f"{graph.dialect}, ONNX opset {graph.opset}"],
        ["ring", f"{' and '.join(map(str, graph.capacities))} slots, chunks of {graph.chunk}, {graph.ring_type}"],
        ["context", "no limit" if graph.max_context is None else f"{graph.max_context} tokens"],
        ["adapters", f"{len(graph.adapter_slots)} slots" if graph.adapter_slots else "no slots"],
        ["recipe", str(manifest.recipe["description"])],
        ["weights", ", ".join(f"{form} {size(held)}" for form, held in formats.items())],
        ["parity", ", ".join(f"{name} {verdict}" for name, verdict in verdicts.items()) or "not verified yet"],
        ["engines", ", ".join(opened.engines()) or "none; the portable graph runs"],
        ["hashes", "hold"],
    ]
    files = [["file", "size"], *([name, size(entry.size)] for name, entry in sorted(manifest.files.items()))]
    data = {**dataclasses.asdict(manifest), "engines": opened.engines(), "hashes_hold": True, "formats": formats}
    emit(json, data, "\n".join(f"{key:<9}{value}" for key, value in facts) + "\n\n" + table(files))


def _share(layer_windows: tuple[int | None, ...], window: int | None) -> str:
    count = layer_windows.count(window)
    return "" if count == len(layer_windows) else f" in {count} of {len(layer_windows)} layers"


def _formats(manifest: "Manifest") -> dict[str, int]:
    """Return the bytes of products' weights by what they are stored in."""
    from galerne.runtime.footprint import forms_of, stored_products

    found: Counter[str] = Counter()
    for product in stored_products(manifest.model, forms_of(manifest.recipe)):
        dtype, block = product.form
        found[dtype if block is None else f"{dtype} in blocks of {block}"] += int(product.stored_bytes)
    return dict(found.most_common())
