"""The reference: the checkpoint in transformers' own class, as a Polygraphy runner."""

import contextlib
import io
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.cases import Case, Plan
from galerne.export.weights import rounded_like
from galerne.optimize.quantize.recipe import Recipe

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Eager attention holds heads x new tokens x keys scores at once, several times over: 256 MB each in float32.
_MOST_SCORES = 64 << 20
_MOST_TOKENS = 1024


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """Runs a plan's cases in transformers: eager attention, float32, the weights rounded as the recipe rounds them.

    The weights are read by transformers and not by Galerne, and never from the bundle. Once active it holds the model in
    float32, and lets it go when deactivated.

    source_logits: of the plan's longest case with the weights as they are, [positions, vocab_size]; set when activated.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, plan: Plan, advance: Callable[[], None]) -> None:
        super().__init__(name="transformers")
        self._checkpoint, self._recipe, self._plan, self._advance = checkpoint, recipe, plan, advance
        self._model: PreTrainedModel | None = None
        self._logits: dict[int, tuple[Int64, Float32]] = {}

    def activate_impl(self) -> None:
        """Load the model, run it as it is on the longest case, and round its weights."""
        self._model = load(self._checkpoint)
        longest = self._plan.longest
        tokens = self._plan.sequences[0][: longest.lengths[0]]
        self.source_logits = logits_at(self._model, tokens, self._plan.positions(longest)[0])
        round_weights(self._model, self._recipe)

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return the one input: the number of the case."""
        return TensorMetadata().add("case", np.int64, (1,))

    def infer_impl(self, feed_dict: dict[str, Any]) -> "OrderedDict[str, npt.NDArray[Any]]":
        """Return the case's outputs by name; one pass over a sequence serves all cases."""
        start = time.perf_counter()
        case = self._plan.cases[int(feed_dict["case"][0])]
        result = self._tokens(case) if case.greedy_tokens else self._rows(case)
        self.inference_time = time.perf_counter() - start
        self._advance()
        return OrderedDict((name, result) for name in case.outputs)

    def deactivate_impl(self) -> None:
        """Let go of the model."""
        self._model = None
        self._logits.clear()

    def _rows(self, case: Case) -> Float32:
        return np.concatenate([self._row(row, wanted) for row, wanted in enumerate(self._plan.positions(case))])

    def _row(self, row: int, wanted: Int64) -> Float32:
        if row not in self._logits:
            assert self._model is not None
            cases = [case for case in self._plan.cases if not case.greedy_tokens and row < len(case.lengths)]
            positions = np.unique(np.concatenate([self._plan.positions(case)[row] for case in cases]))
            tokens = self._plan.sequences[row][: positions[-1] + 1]
            self._logits[row] = (positions, logits_at(self._model, tokens, positions))
        positions, logits = self._logits[row]
        return logits[np.searchsorted(positions, wanted)]

    def _tokens(self, case: Case) -> Int64:
        assert self._model is not None
        return greedy(self._model, self._plan.sequences[0][: case.lengths[0]], case.greedy_tokens)


def load(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load a checkpoint in its architecture's own class of transformers, in float32 with eager attention.

    Raises: InputError if transformers cannot load it.
    """
    folder, extra = checkpoint.path.absolute(), {}
    if checkpoint.format == "gguf":
        folder, extra = folder.parent, {"gguf_file": folder.name}
    try:
        with _quiet():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",
                local_files_only=True,
                **extra,
            )
    except Exception as exc:
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise InputError(f"{checkpoint.path}: transformers cannot load it ({reason})") from exc
    model.eval()
    return model


def source_window(checkpoint: Checkpoint) -> int | None:
    """Return the window of a checkpoint's layers as transformers reads its config, and not as Galerne does; None for none.

    Raises: InputError if transformers cannot read the config.
    """
    try:
        with _quiet():
            config = AutoConfig.for_model(**{"model_type": "", **checkpoint.config})
    except Exception as exc:
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise InputError(f"{checkpoint.path}: transformers cannot read its config ({reason})") from exc
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window: int | None = getattr(config, "sliding_window", None)
    return window if "sliding_attention" in kinds else None


def round_weights(model: PreTrainedModel, recipe: Recipe) -> None:
    """Round a model's weights in place, tensor by tensor, to what the recipe stores."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, torch.nn.Embedding) and isinstance(head, torch.nn.Linear)
    if head.weight is embedding.weight and recipe.lm_head.bits is not None:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = rounded_like(parameter.data, name, recipe)


@torch.inference_mode()
def logits_at(model: PreTrainedModel, tokens: Int64, positions: Int64) -> Float32:
    """Return the logits after some of a sequence's tokens.

    Short sequences take one pass without a cache; long ones go block by block through transformers' own cache.

    Args:
        tokens: [T] int64.
        positions: [K] int64, ascending.
    Returns: [K, vocab_size] float32.
    """
    heads = int(model.config.num_attention_heads)
    block = max(16, min(_MOST_TOKENS, _MOST_SCORES // (heads * len(tokens))))
    cache = DynamicCache(config=model.config) if len(tokens) > block else None
    parts = []
    for first in range(0, len(tokens), block):
        kept = positions[(positions >= first) & (positions < first + block)] - first
        ids = torch.from_numpy(tokens[None, first : first + block].copy())
        output = model(ids, cache=cache, use_cache=cache is not None, logits_to_keep=torch.from_numpy(kept))
        parts.append(output.logits[0].numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Int64, count: int) -> Int64:
    """Return the `count` likeliest tokens after a prompt, each fed back through transformers' own cache."""
    cache = DynamicCache(config=model.config)
    tokens: list[int] = []
    fed = torch.from_numpy(prompt[None].copy())
    while len(tokens) < count:
        for part in fed.split(_MOST_TOKENS, dim=1):
            logits = model(part, cache=cache, use_cache=True, logits_to_keep=1).logits
        fed = logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens.append(int(fed))
    return np.array(tokens, np.int64)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and hints off stderr, which is our own; its errors arrive as exceptions."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar heeds no setting
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
