"""onnxruntime-genai, as one process of the benchmark: `python -m benchmarks.peer_onnxruntime_genai FOLDER …`."""

import importlib
import json
from typing import Any

import numpy as np

from benchmarks.measure import WARM_UP_TOKENS, Request, measure, read_request

# By name, since it is no dependency of this project and not there to be type-checked; here, so that loading is timed without it.
lib = importlib.import_module("onnxruntime_genai")


class GenaiSession:
    """A model and a greedy generator. It allocates its keys for the whole of the run's length at once."""

    def __init__(self, request: Request) -> None:
        config = lib.Config(str(request.model))
        threads = {"intra_op_num_threads": request.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._length = max(request.prompt, WARM_UP_TOKENS) + request.decode + 2
        self._model = lib.Model(config)
        self._generator: Any = self._new_generator()
        self._last: int | None = None

    def _new_generator(self) -> Any:
        params = lib.GeneratorParams(self._model)
        # A least length too, so that the end-of-text token of a random model does not end the run.
        params.set_search_options(max_length=self._length, min_length=self._length, do_sample=False)
        return lib.Generator(self._model, params)

    def reset(self) -> None:
        """Forget the sequence."""
        self._generator = None  # before the next one is made, so that two caches are never there at once
        self._generator, self._last = self._new_generator(), None

    def feed(self, tokens: list[int]) -> int:
        """Append tokens to the sequence and return the likeliest next one.

        The token that the generator chose itself is in its sequence already and is run by the next step.
        """
        if tokens != [self._last]:
            self._generator.append_tokens(np.array(tokens, np.int32))
        self._generator.generate_next_token()
        self._last = int(self._generator.get_next_tokens()[0])
        return self._last


if __name__ == "__main__":
    measure(read_request(), "onnxruntime-genai", GenaiSession)
