"""The `cpu` engine: the graph after ONNX Runtime's own optimization, with its weights packed as its kernels read them."""

import os
import tempfile
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from galerne.errors import BackendError, one_line
from galerne.optimize.lower.group_heads import group_heads
from galerne.optimize.lower.projection_blocks import projection_blocks
from galerne.optimize.lower.single_token import single_token
from galerne.optimize.lower.split_projection import split_projection
from galerne.optimize.lower.widen import widen
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.cpu import ENGINE_GRAPH, ENGINE_WEIGHTS
from galerne.runtime.engines.cpu_features import cpu_features
from galerne.runtime.engines.ort import session_options
from galerne.runtime.engines.record import SCHEMA_VERSION, EngineRecord, inputs_of, parity_of
from galerne.runtime.engines.tensorrt.package import numbers
from galerne.targets.target import Stack, Target

# Smaller tensors stay inside the graph file.
_EXTERNAL_FROM_BYTES = 1024
# What 1.31.1 saves of packed int4 weights it reads back as others. Before this version an engine is packed when it is opened.
_PACKS_SINCE = (1, 32)


def build_ort_cpu(bundle: Bundle, target: Target, stack: Stack, folder: Path) -> EngineRecord:
    """Build the engine into `folder`, which exists and is empty.

    Raises: BackendError if ONNX Runtime cannot optimize the graph.
    """
    facts = bundle.manifest.model
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        lowered = Path(scratch) / GRAPH
        # ONNX Runtime opens external data beside the graph only, and follows no symbolic link out of its folder.
        os.link(bundle.file(WEIGHTS), lowered.with_name(WEIGHTS))
        model = ir.load(bundle.file(GRAPH))
        widen(model)
        group_heads(model, facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim)
        single_token(model)
        projection_blocks(model, facts.vocab_size)
        split_projection(model, facts.vocab_size)
        ir.save(model, lowered)
        del model
        # Two sessions, so that memory never holds the weights twice: one rewrites the graph, and the next maps what that one
        # wrote and packs it.
        packed = numbers(ort.__version__) >= _PACKS_SINCE
        optimized = (Path(scratch) if packed else folder) / ENGINE_GRAPH
        _save_optimized(bundle, lowered, optimized, pack=False)
        lowered.with_name(WEIGHTS).unlink()
        if packed:
            _save_optimized(bundle, optimized, folder / ENGINE_GRAPH, pack=True)
    return EngineRecord(
        schema_version=SCHEMA_VERSION,
        target=target.name,
        backend="onnxruntime",
        backend_version=ort.__version__,
        file=ENGINE_GRAPH,
        compute_capability=None,
        cpu_features=cpu_features(),
        profiles=(),
        inputs=inputs_of(bundle, (GRAPH, WEIGHTS)),
        parity=parity_of(bundle),
        options={
            "lowerings": ["widen", "group_heads", "single_token", "projection_blocks", "split_projection"],
            "packed": packed,
        },
        stack=stack.name,
    )


def _save_optimized(bundle: Bundle, graph: Path, out: Path, *, pack: bool) -> None:
    """Let ONNX Runtime optimize a graph and save it with its weights beside it, as they are or packed for its kernels."""
    options = session_options(exact=False, threads=None)
    options.optimized_model_filepath = str(out)
    for key, setting in (
        ("session.disable_prepacking", "0" if pack else "1"),
        ("session.save_external_prepacked_constant_initializers", "1" if pack else "0"),
        ("session.optimized_model_external_initializers_file_name", ENGINE_WEIGHTS),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(_EXTERNAL_FROM_BYTES)),
    ):
        options.add_session_config_entry(key, setting)
    try:
        ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime's errors share no base class of their own
        raise BackendError(
            f"{bundle.path}: ONNX Runtime {ort.__version__} cannot optimize it: {one_line(exc)}"
        ) from exc
