"""Measures what a bundle's recipe costs: the bundle beside its unrounded source, on the same text."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.streamed import StreamedModel
from galerne.export.quality.bundle_weights import BundleWeights
from galerne.export.quality.distance import Distance, Float32, Int64, distance
from galerne.export.quality.layers import layer_errors
from galerne.export.quality.report import QualityReport, judge
from galerne.export.quality.thresholds import Thresholds
from galerne.export.text import sequences
from galerne.progress import Task
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.model import Model
from galerne.runtime.tokenizer import Tokenizer

DEFAULT_TOKENS, DEFAULT_LENGTH = 4096, 512
# Logits of one pass of the reference, which reads all weights anew where they are more than it may hold.
_MOST_LOGITS = 64 << 20
# Tokens that the layers' errors are taken over: all layers' outputs for them are held at once.
_LAYER_TOKENS = 256


def measure(
    bundle: Bundle,
    checkpoint: Checkpoint,
    text: Path,
    *,
    limits: Thresholds,
    engine: str | None = None,
    tokens: int = DEFAULT_TOKENS,
    length: int = DEFAULT_LENGTH,
) -> QualityReport:
    """Feed text to a bundle and to its source, and compare what they say of each next token.

    The source is the checkpoint in transformers' own class: float32, eager attention, weights as they are; they are streamed,
    so that it need not fit into memory. The bundle runs as it would be used, not in its exact mode.

    Args:
        engine: what runs the bundle; by default what `generate` takes.
        tokens: how many to feed at most. length: of one sequence.
    Raises: InputError if the text is unfit (see `sequences`), the checkpoint's vocabulary is not the bundle's, or the numbers are
        out of range; BackendError if the engine cannot run here.
    """
    limit = bundle.manifest.graph.max_context
    if not 2 <= length <= tokens:
        raise InputError(f"--length {length}: expected from 2 to --tokens, which is {tokens}")
    if limit is not None and length > limit:
        raise InputError(f"--length {length}: the bundle's longest context is {limit}")
    fed = sequences(Tokenizer.open(bundle), text, length, tokens)
    source = StreamedModel(checkpoint)
    model = bundle.manifest.model
    if source.model.config.vocab_size != model.vocab_size:
        raise InputError(
            f"{checkpoint.path}: vocab_size: expected {model.vocab_size}, the bundle's, found {source.model.config.vocab_size}"
        )
    with Task("quality", len(fed)) as task, Model.open(bundle.path, engine) as opened:
        found = []
        for ids, expected in source_logits(source, fed, model.vocab_size):
            found.append(distance(ids, expected, _bundle_logits(opened, ids)))
            task.advance()
        name = opened.engine.name
    layers = layer_errors(source, BundleWeights(bundle), fed[0][:_LAYER_TOKENS])
    files = bundle.manifest.files
    return QualityReport(
        engine=name,
        recipe=str(bundle.manifest.recipe["description"]),
        text=text.name,
        tokens=fed.size,
        sequences=len(fed),
        size_bytes=sum(files[file].size for file in (GRAPH, WEIGHTS)),
        thresholds=limits,
        layers=layers,
        **judge(Distance.join(found), limits),
    )


def source_logits(source: StreamedModel, fed: Int64, vocab_size: int) -> Iterator[tuple[Int64, Float32]]:
    """Yield each sequence [S] and the source's logits after each of its tokens [S, vocab_size]."""
    together = max(1, _MOST_LOGITS // (fed.shape[1] * vocab_size))
    for first in range(0, len(fed), together):
        ids = fed[first : first + together]
        with torch.inference_mode():
            logits = source.model(torch.from_numpy(ids.copy()), use_cache=False).logits.numpy()
        yield from zip(ids, logits, strict=True)


def _bundle_logits(model: Model, ids: Int64) -> Float32:
    rows = model.rows()
    try:
        return np.concatenate(rows.feed_all([ids]))
    finally:
        rows.close()
