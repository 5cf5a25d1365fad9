"""From a spec to an ONNX graph: the module is built on the meta device and traced, so no weight is ever loaded."""

import contextlib
import io
import logging
import warnings

import onnx_ir as ir
import torch

from galerne.export.decoder import Decoder
from galerne.export.dialects.dialect import dialect_module
from galerne.export.spec import DecoderSpec
from galerne.runtime.footprint import HEAD, TABLE
from galerne.runtime.manifest import Dialect, cache_names, layer_kinds, write_index_names

# Sizes of the traced example. Any would do: all four are dynamic in the graph. None may be 1, which is specialized on.
_BATCH, _TOKENS, _LOGITS, _SLOTS = 2, 3, 2, 8


def trace(spec: DecoderSpec, compute_type: torch.dtype, dialect: Dialect = "opset24") -> ir.Model:
    """Trace the decoder into a graph whose weights are names without data.

    Args:
        spec: the model.
        compute_type: of weights, activations and the ring; norms, rotation and logits are float32 all the same.
        dialect: how the graph spells its operators.
    """
    windows, _ = layer_kinds(spec.layer_windows)
    spelled = dialect_module(dialect)
    with torch.device("meta"):
        module = Decoder(spec).to(compute_type).eval()
        for name, parameter in module.named_parameters():
            if "norm" in name.rsplit(".", 2)[-2]:
                parameter.data = parameter.data.float()
        for buffer in module.buffers():
            buffer.data = buffer.data.float()
        past = [
            torch.zeros(_BATCH, spec.num_key_value_heads, _SLOTS, spec.head_dim, dtype=compute_type)
            for _ in range(2 * spec.num_hidden_layers)
        ]
        args = (
            torch.zeros(_BATCH, _TOKENS, dtype=torch.int64),
            torch.zeros(_BATCH, _TOKENS, dtype=torch.int64),
            [torch.zeros(_BATCH, dtype=torch.int64) for _ in windows],
            torch.zeros(_BATCH, _LOGITS, dtype=torch.int64),
            past,
        )
    dynamic = torch.export.Dim.DYNAMIC
    row, ring_axes = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            opset_version=spelled.OPSET,
            optimize=False,  # the exporter's own optimizer wants the weights' data
            verify=False,
            dynamic_shapes=(row, row, [{0: dynamic}] * len(windows), row, [ring_axes] * len(past)),
            custom_translation_table=spelled.translations(compute_type),
            input_names=[
                "input_ids",
                "position_ids",
                *write_index_names(len(windows)),
                "logit_indices",
                *cache_names("past_key_values", spec.num_hidden_layers),
            ],
            output_names=["logits", *cache_names("present", spec.num_hidden_layers)],
        )
    assert program is not None
    if spec.tie_word_embeddings:  # one tensor under two names; checkpoints keep it under the embedding's
        program.model.graph.initializers[HEAD].name = TABLE
    return program.model


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Keep the exporter's progress off our streams: it prints to stdout, which belongs to the result."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
