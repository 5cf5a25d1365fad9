"""onnxruntime-genai, as one process of the benchmark: `python -m benchmarks.peer_onnxruntime_genai FOLDER …`."""

import importlib
import json

import numpy as np

from benchmarks.measure import Request, measure, read_request, WARM_UP_TOKENS


class GenaiSession:
    """A model and its generator, greedy. onnxruntime-genai keeps keys for `max_length` tokens from the start."""

    def __init__(self, request: Request) -> None:
        # Imported by name: it is no dependency of this project, so it is not there to be type-checked.
        self._lib = lib = importlib.import_module("onnxruntime_genai")
        config = lib.Config(str(request.model))
        session_options = {"intra_op_num_threads": request.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
        self._length = max(request.prompt + request.decode, WARM_UP_TOKENS + 1) + 1
        self._model = lib.Model(config)
        self._generator = self._new_generator()
        self._fed = 0

    def _new_generator(self) -> object:
        params = self._lib.GeneratorParams(self._model)
        # A least length as well, so that the end-of-text token of a random model does not end the run.
        params.set_search_options(max_length=self._length, min_length=self._length, do_sample=False)
        return self._lib.Generator(self._model, params)

    def reset(self) -> None:
        """Forget the sequence."""
        self._generator = None
        self._generator = self._new_generator()
