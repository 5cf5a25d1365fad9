"""Generation: tokens one by one, and text with stop strings."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from galerne.errors import InputError
from galerne.runtime.adapter import Adapter
from galerne.runtime.lookup import PromptLookup
from galerne.runtime.model import Model
from galerne.runtime.rows import Float32
from galerne.runtime.sampling import Sampler, SamplingOptions
from galerne.runtime.stops import StopFilter
from galerne.runtime.tokenizer import Tokenizer

# "eos": the model ended; "stop": a stop string; "length": enough tokens; "context": the bundle's longest context.
StopReason = Literal["eos", "stop", "length", "context"]
GREEDY = SamplingOptions()


@dataclass
class Timings:
    """Rates of one generation, in tokens per second, and the seconds and counts behind them.

    drafted_tokens: how many tokens were guessed by prompt lookup and checked, right or wrong.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    drafted_tokens: int = 0

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
        speculate: int = 0,
        adapter: Adapter | None = None,
    ) -> None:
        """Prepare a generation.

        Args:
            speculate: the most tokens to draft from the text itself and check in one run. The output is the same; a text
                that repeats itself, such as an edit of code, comes faster. 0 for none.
            adapter: a LoRA adapter that the model loaded.
        """
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise InputError(f"prompt {row}: empty; expected at least one token")
        if max_new_tokens < 1:
            raise InputError(f"--max-new-tokens: expected at least 1, found {max_new_tokens}")
        if speculate < 0:
            raise InputError(f"--speculate: expected 0 or more, found {speculate}")
        self.outputs = [Output() for _ in prompts]
        self.timings = Timings()
        self._model, self._prompts, self._max, self._adapter = model, prompts, max_new_tokens, adapter
        self._eos = frozenset() if ignore_eos else frozenset(model.facts.eos_token_ids)
        # Rows draw from generators of their own, so that a row's tokens do not depend on its neighbours.
        self._samplers = [Sampler(sampling) for _ in prompts]
        self._lookups = [PromptLookup(speculate, prompt) for prompt in prompts] if speculate else []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rows = self._model.rows(len(self._prompts), adapter=self._adapter)
        start = time.perf_counter()
        logits = list(rows.feed(self._prompts)[:, None])
        self.timings.prefill_tokens = sum(len(prompt) for prompt in self._prompts)
        self.timings.prefill_s = time.perf_counter() - start
        drafts: list[list[int]] = [[] for _ in self._prompts]
        start = time.perf_counter()
        while True:
            fed: list[list[int]] = []
            wrong: list[int] = []
            for row, draft in enumerate(drafts):
                token, kept = None, 0
                for token in self._accepted(row, logits[row], draft):
                    kept += 1
                    yield row, token
                # What is fed next is the last token, and behind it what may follow; what was fed of a draft and is wrong goes.
                running = token is not None and self.outputs[row].stop_reason is None
                wrong.append(len(draft) - kept + 1 if running else 0)
                drafts[row] = self._draft(row, len(draft), kept - 1) if running else []
                fed.append([token, *drafts[row]] if token is not None and running else [])
            if not any(fed):
                return
            if any(wrong):
                rows.rewind(wrong)
            logits = rows.feed_all(fed) if any(drafts) else list(rows.feed(fed)[:, None])
            self.timings.decode_s = time.perf_counter() - start

    def _accepted(self, row: int, logits: Float32, draft: Sequence[int]) -> Iterator[int]:
        """Yield the tokens that logits [1 + draft, vocab_size] give: one, and one more for each drafted one that is right."""
        output, limit = self.outputs[row], self._model.graph.max_context
        for i in range(len(draft) + 1):
            if output.stop_reason is not None:
                return
            token = self._samplers[row].sample(logits[i])
            if token in self._eos:
                output.stop_reason = "eos"
                return
            self.timings.decode_tokens += bool(output.ids)  # the first one is the prefill's
            output.ids.append(token)
            if len(output.ids) == self._max:
                output.stop_reason = "length"
            elif len(self._prompts[row]) + len(output.ids) - 1 == limit:
                output.stop_reason = "context"
            yield token
            if i < len(draft) and token != draft[i]:
                return

    def _draft(self, row: int, drafted: int, kept: int) -> list[int]:
        if not self._lookups:
            return []
        lookup, ids, graph = self._lookups[row], self.outputs[row].ids, self._model.graph
        for token in ids[len(ids) - kept - 1 :]:
            lookup.append(token)
        lookup.kept(drafted, kept)
        # A ring takes back a chunk of tokens at least, and a draft never reaches beyond the text's last token.
        room = min(self._max - len(ids), graph.chunk) - 1
        if graph.max_context is not None:
            room = min(room, graph.max_context - len(self._prompts[row]) - len(ids))
        draft = lookup.draft(room)
        self.timings.drafted_tokens += len(draft)
        return draft

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
