"""llama.cpp through llama-cpp-python's C interface, as one process: `python -m benchmarks.peer_llama_cpp FILE.gguf …`.

The C interface and not its `Llama` class, which copies all logits at each step and would make llama.cpp look slower.
"""

import ctypes
import importlib

import numpy as np

from benchmarks.measure import VOCAB_SIZE, WARM_UP_TOKENS, Request, measure, read_request

# By name, since it is no dependency of this project and not there to be type-checked; here, so that loading is timed without it.
lib = importlib.import_module("llama_cpp")
_CONTEXT_STEP = 256


class LlamaCppSession:
    """A model and a context of just the length that the run takes; all else as llama.cpp has it by default."""

    def __init__(self, request: Request) -> None:
        lib.llama_backend_init()
        model_params = lib.llama_model_default_params()
        if not request.mapped:
            model_params.load_mode = lib.LLAMA_LOAD_MODE_NONE
        self._model = lib.llama_model_load_from_file(str(request.model).encode(), model_params)
        if not self._model:
            raise SystemExit(f"{request.model}: llama.cpp cannot load it")
        params = lib.llama_context_default_params()
        length = max(request.prompt + request.decode, WARM_UP_TOKENS) + 1
        params.n_ctx = -(-length // _CONTEXT_STEP) * _CONTEXT_STEP
        params.n_batch = max(params.n_batch, request.prompt)  # the most tokens that one call takes
        params.n_threads = params.n_threads_batch = request.threads
        self._context = lib.llama_init_from_model(self._model, params)

    def reset(self) -> None:
        """Forget the sequence."""
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)

    def feed(self, tokens: list[int]) -> int:
        """Append tokens to the sequence and return the likeliest next one."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        status = lib.llama_decode(self._context, lib.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            raise SystemExit(f"llama_decode: status {status}")
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, -1), (VOCAB_SIZE,))
        return int(logits.argmax())


if __name__ == "__main__":
    measure(read_request(), "llama.cpp", LlamaCppSession)
