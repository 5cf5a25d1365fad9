"""The way from a checkpoint to a bundle."""

import dataclasses
import importlib.metadata
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

import galerne
from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.decoder import Decoder
from galerne.export.dialects.dialect import dialect_module
from galerne.export.facts import model_facts
from galerne.export.families.registry import read_spec
from galerne.export.hashing import SourceHashes
from galerne.export.prequantized import check_recipe
from galerne.export.shared_table import is_shared
from galerne.export.spec import DecoderSpec
from galerne.export.split_products import split_products
from galerne.export.trace import trace
from galerne.export.weights import write_weights
from galerne.files import staged_folder
from galerne.optimize.graph.adapter_slots import add_adapter_slots
from galerne.optimize.graph.clean import clean
from galerne.optimize.graph.names import name as name_graph
from galerne.optimize.graph.weights import fold_weights
from galerne.optimize.quantize.cache import round_cache
from galerne.optimize.quantize.qdq import opset_of
from galerne.optimize.quantize.recipe import AnyRecipe, check_overrides
from galerne.optimize.quantize.table import share_quantized_table
from galerne.progress import Task, step
from galerne.runtime.bundle import GRAPH, MANIFEST, WEIGHTS, Bundle, entry_of
from galerne.runtime.footprint import HEAD, TABLE, weight_names
from galerne.runtime.manifest import SCHEMA_VERSION, Dialect, GraphFacts, Manifest, Source, layer_kinds

DEFAULT_CHUNK = 256
_TOOLS = ("torch", "onnx-ir", "onnxscript", "onnx", "numpy")


def export(
    checkpoint: Checkpoint,
    recipe: AnyRecipe,
    out: Path,
    *,
    chunk: int = DEFAULT_CHUNK,
    max_context: int | None = None,
    dialect: Dialect = "opset24",
    threads: int | None = None,
    adapter_slots: bool = False,
) -> Bundle:
    """Write a bundle: trace on the meta device, then stream the weights.

    Args:
        checkpoint: the source.
        recipe: how to store the weights.
        out: the bundle's folder, which must not exist. It appears whole or not at all.
        chunk: the most new tokens of one run of the graph.
        max_context: the longest sequence in tokens. Without a window it sizes the ring and defaults to what the model was
            made for; with one the default is no limit.
        dialect: how the graph spells its operators.
        threads: that weights are made on, by default one for each core. The bundle's bytes do not depend on it.
        adapter_slots: give each product inputs for a LoRA adapter, so that one can be chosen at run time.
    Raises: InputError if the model is not supported, a tensor is missing or has the wrong shape, an override of the recipe
        matches no weight, or `out` cannot be written.
    """
    check_recipe(checkpoint, recipe)
    spec = read_spec(checkpoint.config, config_name(checkpoint))
    check_tensors(spec, checkpoint)
    check_overrides(recipe, weight_names(model_facts(spec)), str(checkpoint.path))
    facts = graph_facts(spec, recipe, chunk, max_context, dialect)
    tokenizer = checkpoint.tokenizer_files()  # before the weights: what is wrong with it shall show at once
    with staged_folder(out) as folder, SourceHashes(checkpoint.files()) as source_hashes:
        with step(f"trace {spec.architecture}, {spec.num_hidden_layers} layers"):
            model = trace(spec, getattr(torch, recipe.compute), dialect)
            clean(model)
            shared, quantized_table = is_shared(spec, checkpoint, recipe), recipe.table.bits is not None
            weights = fold_weights(model, keep_tied=shared and not quantized_table)
            name_graph(model, layer_kinds(spec.layer_windows)[1])
            round_cache(model.graph, checkpoint.cache_scales())
        frequencies = {
            f"model.rotary.{i}.frequencies": np.array(rotary.frequencies, np.float32)
            for i, rotary in enumerate(dict.fromkeys(spec.layer_rotary))
        }
        stored = [weight for weight in weights if weight.name not in frequencies]
        for name, values in frequencies.items():
            model.graph.initializers[name].const_value = ir.tensor(values, name=name)
        stored = split_products(model, stored, checkpoint, recipe)
        if adapter_slots:
            facts = dataclasses.replace(facts, adapter_slots=add_adapter_slots(model, stored, checkpoint.shapes()))
        if written_as_head := shared and quantized_table:
            stored = [weight for weight in stored if weight.name != TABLE]
        count = sum(math.prod(weight.shape) for weight in stored)
        bytes_per_weight = sum(file.stat().st_size for file in checkpoint.files()) / count
        with Task("weights", count) as task:

            def advance(done: int) -> None:
                task.advance(done)
                source_hashes.used(done * bytes_per_weight)

            written = write_weights(model, stored, checkpoint, recipe, folder / WEIGHTS, advance, threads)
        if written_as_head:
            share_quantized_table(model.graph, model.graph.initializers[TABLE], HEAD)
        # int4 and blocks need a newer DequantizeLinear than the primitive dialect's other operators do.
        facts = dataclasses.replace(facts, opset=max(facts.opset, opset_of(model.graph)))
        model.opset_imports[""] = facts.opset
        ir.save(model, folder / GRAPH)
        for file, data in sorted(tokenizer.items()):
            (folder / file).write_bytes(data)
        others = {path.name: entry_of(path) for path in folder.iterdir() if path.name != WEIGHTS}
        with step("hash source"):  # what is left of it
            entries = source_hashes.entries()
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            galerne_version=galerne.__version__,
            source=Source(checkpoint.format, entries),
            model=dataclasses.replace(model_facts(spec), tie_word_embeddings=spec.tie_word_embeddings or shared),
            graph=facts,
            recipe=recipe.resolved(),
            tools={tool: importlib.metadata.version(tool) for tool in _TOOLS},
            files={**others, WEIGHTS: written},
        )
        (folder / MANIFEST).write_bytes(manifest.to_json())
    return Bundle.open(out)


def graph_facts(
    spec: DecoderSpec, recipe: AnyRecipe, chunk: int, max_context: int | None, dialect: Dialect = "opset24"
) -> GraphFacts:
    """Return the contract's sizes for a model.

    Raises: InputError if `chunk` or `max_context` is not at least 1.
    """
    for option, size in (("chunk", chunk), ("max-context", max_context)):
        if size is not None and size < 1:
            raise InputError(f"--{option}: expected at least 1, found {size}")
    windows, _ = layer_kinds(spec.layer_windows)
    if spec.context_limit is not None and (max_context or 0) > spec.context_limit:
        raise InputError(
            f"--max-context: expected at most {spec.context_limit}, found {max_context}: in a longer text the source rotates "
            "all keys by other angles, those in the cache too"
        )
    max_context = max_context or spec.context_limit
    if None in windows:
        max_context = max_context or spec.max_position_embeddings
    limit = math.inf if max_context is None else max_context
    chunk = int(min(chunk, limit))
    capacities = tuple(int(limit if window is None else min(window + chunk, limit)) for window in windows)
    opset = dialect_module(dialect).OPSET
    return GraphFacts(dialect, opset, recipe.compute, chunk, capacities, max_context, rounded_cache=recipe.cache)


def check_tensors(spec: DecoderSpec, checkpoint: Checkpoint) -> None:
    """Hold the checkpoint's tensors against the decoder's parameters.

    Raises: InputError if one is missing, has another shape, or is none of the decoder's.
    """
    with torch.device("meta"):
        wanted = {name: tuple(parameter.shape) for name, parameter in Decoder(spec).named_parameters()}
    found = checkpoint.shapes()
    unused = sorted(found.keys() - wanted.keys() - _harmless(spec, checkpoint))
    if unused:
        raise InputError(
            f"{checkpoint.path}: tensor {unused[0]}: no part of a {spec.architecture} as its config describes it, so Galerne "
            f"would leave it out ({len(unused)} such tensors)"
        )
    for name, shape in wanted.items():
        if name not in found:
            raise InputError(f"{checkpoint.path}: tensor {name}: missing; expected shape {list(shape)}")
        if tuple(found[name]) != shape:
            raise InputError(
                f"{checkpoint.path}: tensor {name}: shape {list(found[name])}; expected {list(shape)} from config.json"
            )


def _harmless(spec: DecoderSpec, checkpoint: Checkpoint) -> set[str]:
    """Return the tensors that say what is known without them: rotary frequencies, a head that is the embedding, zero biases."""
    names = checkpoint.shapes()
    tied = {"lm_head.weight"} if spec.tie_word_embeddings else set()
    # auto-gptq stores a bias of zeros where the model has none.
    zeros = {name for name in names if name.endswith("_proj.bias") and not bool((checkpoint.read(name) != 0).any())}
    return tied | zeros | {name for name in names if name.endswith(".rotary_emb.inv_freq")}


def config_name(checkpoint: Checkpoint) -> str:
    """Return the file that a checkpoint's config is read from, for messages."""
    names = {"safetensors": "config.json", "consolidated": "params.json"}
    return str(checkpoint.path / names[checkpoint.format] if checkpoint.format in names else checkpoint.path)
