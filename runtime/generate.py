"""Generation: tokens one by one, and text with stop strings."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from galerne.errors import InputError
from galerne.runtime.model import Model
from galerne.runtime.sampling import Sampler, SamplingOptions
from galerne.runtime.stops import StopFilter
from galerne.runtime.tokenizer import Tokenizer

# "eos": the model ended; "stop": a stop string; "length": enough tokens; "context": the bundle's longest context.
StopReason = Literal["eos", "stop", "length", "context"]
GREEDY = SamplingOptions()


@dataclass
class Timings:
    """Rates of one generation, in tokens per second, and the seconds and counts behind them."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens over the time until the first token is known."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first one over the time they took."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass
class Output:
    """What one row has generated so far; `stop_reason` is set when it is done."""

    ids: list[int] = field(default_factory=list)
    stop_reason: StopReason | None = None


class Generation:
    """Generates for a batch of prompts of any lengths; iterate it for (row, token id) as they come.

    outputs: one for each prompt.
    timings: of the whole batch, right when the iteration has ended.

    Raises: InputError on an empty prompt, a token outside of the vocabulary, or a prompt beyond the longest context.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: SamplingOptions = GREEDY,
        ignore_eos: bool = False,
    ) -> None:
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise InputError(f"prompt {row}: empty; expected at least one token")
        if max_new_tokens < 1:
            raise InputError(f"--max-new-tokens: expected at least 1, found {max_new_tokens}")
        self.outputs = [Output() for _ in prompts]
        self.timings = Timings()
        self._model, self._prompts, self._max = model, prompts, max_new_tokens
        self._eos = frozenset() if ignore_eos else frozenset(model.facts.eos_token_ids)
        # Rows draw from generators of their own, so that a row's tokens do not depend on its neighbours.
        self._samplers = [Sampler(sampling) for _ in prompts]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rows, limit = self._model.rows(len(self._prompts)), self._model.graph.max_context
        start = time.perf_counter()
        logits = rows.feed(self._prompts)
        self.timings.prefill_tokens = sum(len(prompt) for prompt in self._prompts)
        self.timings.prefill_s = time.perf_counter() - start
        start = time.perf_counter()
        while True:
            fed: list[list[int]] = []
            for row, output in enumerate(self.outputs):
                fed.append([])
                if output.stop_reason is not None:
                    continue
                token = self._samplers[row].sample(logits[row])
                if token in self._eos:
                    output.stop_reason = "eos"
                    continue
                output.ids.append(token)
                if len(output.ids) == self._max:
                    output.stop_reason = "length"
                elif rows.lengths[row] == limit:
                    output.stop_reason = "context"
                else:
                    fed[row].append(token)
                yield row, token
            if not any(fed):
                return
            logits = rows.feed(fed)
            self.timings.decode_tokens += sum(map(len, fed))
            self.timings.decode_s = time.perf_counter() - start

    def stop(self, row: int) -> None:
        """End a row because its text holds a stop string; the iteration goes on with the others."""
        if self.outputs[row].stop_reason in (None, "length", "context"):
            self.outputs[row].stop_reason = "stop"


class TextGeneration:
    """Generates text for one prompt; iterate it for pieces of text as they become certain.

    generation: the tokens behind it, with timings and, when the iteration has ended, the stop reason.
    text: all that was given out so far.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.generation, self.text = generation, ""
        self._stream, self._filter = tokenizer.stream(), StopFilter(stops)

    def __iter__(self) -> Iterator[str]:
        for row, token in self.generation:
            yield from self._given(self._filter.push(self._stream.push(token)))
            if self._filter.stopped is not None:
                self.generation.stop(row)
                return
        yield from self._given(self._filter.push(self._stream.finish()) + self._filter.finish())
        if self._filter.stopped is not None:
            self.generation.stop(0)

    def _given(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece
