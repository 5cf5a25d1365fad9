"""The reference: the checkpoint in transformers' own class, as a Polygraphy runner."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from transformers import DynamicCache, PreTrainedModel

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.cases import Case, Plan
from galerne.export.parity.streamed import StreamedModel
from galerne.export.parity.tolerances import Tolerance
from galerne.optimize.quantize.recipe import AnyRecipe

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Tokens of one pass. Each pass reads all weights anew, and holds some activations of each token.
_MOST_TOKENS = 5120


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """Runs a plan's cases in transformers: eager attention, float32, the weights rounded as the recipe rounds them.

    The weights are not read by Galerne, and never from the bundle; see `StreamedModel`.

    source_logits: of the plan's longest case with the weights as they are, [positions, vocab_size]; set when activated.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: AnyRecipe,
        plan: Plan,
        advance: Callable[[], None],
        *,
        generated: Mapping[str, Int64],
        tolerance: Tolerance,
        adapter: Path | None = None,
        rounded_inputs: bool = True,
    ) -> None:
        """Prepare a run.

        Args:
            generated: the candidate's tokens by the case's name, for cases that generate freely; they must be there by then.
            tolerance: how far two logits may differ and still count as equal.
            adapter, rounded_inputs: as in `StreamedModel`.
        """
        super().__init__(name="transformers")
        self._checkpoint, self._recipe, self._plan, self._advance = checkpoint, recipe, plan, advance
        self._generated, self._tolerance, self._adapter = generated, tolerance, adapter
        self._rounded_inputs = rounded_inputs
        self._model: PreTrainedModel | None = None
        self._logits: dict[int, tuple[Int64, Float32]] = {}

    def activate_impl(self) -> None:
        """Open the model, run it as it is on the longest case, and have its weights rounded from then on."""
        streamed = StreamedModel(self._checkpoint, self._adapter, rounded_inputs=self._rounded_inputs)
        self._model, longest = streamed.model, self._plan.longest
        tokens = self._plan.sequences[0][: longest.lengths[0]]
        self.source_logits = logits_at(self._model, tokens, self._plan.positions(longest)[0])
        streamed.rounding = self._recipe

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
        """Return the likeliest token after each of the candidate's own; its own one where that is as good as the likeliest."""
        assert self._model is not None
        prompt, tokens = self._plan.sequences[0][: case.lengths[0]], self._generated[case.name]
        fed = np.concatenate([prompt, tokens[:-1]])
        logits = logits_at(self._model, fed, np.arange(len(prompt) - 1, len(fed)))
        near = logits.max(axis=1) - self._tolerance.limits(float(logits.std())).max_abs
        chosen: Int64 = np.where(logits[np.arange(len(tokens)), tokens] >= near, tokens, logits.argmax(axis=1))
        return chosen


@torch.inference_mode()
def logits_at(model: PreTrainedModel, tokens: Int64, positions: Int64) -> Float32:
    """Return the logits after some of a sequence's tokens.

    One that is not too long takes one pass without a cache; others go block by block through transformers' own cache.

    Args:
        tokens: [T] int64.
        positions: [K] int64, ascending.
    Returns: [K, vocab_size] float32.
    """
    block = _MOST_TOKENS
    cache = DynamicCache(config=model.config) if len(tokens) > block else None
    parts = []
    for first in range(0, len(tokens), block):
        kept = positions[(positions >= first) & (positions < first + block)] - first
        ids = torch.from_numpy(tokens[None, first : first + block].copy())
        output = model(ids, cache=cache, use_cache=cache is not None, logits_to_keep=torch.from_numpy(kept))
        parts.append(output.logits[0].numpy())
    return np.concatenate(parts)
