"""llama.cpp's own quantizer and what its model says of each next token: `python -m benchmarks.peer_quality_llama_cpp`.

Runs in the peers' environment. It takes a float GGUF file, and needs no tokenizer: it is fed ids.
"""

import argparse
import ctypes
import importlib
import json
import time
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

# By name, since it is no dependency of this project and not there to be type-checked.
lib = importlib.import_module("llama_cpp")
TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q4_K_M": "MOSTLY_Q4_K_M", "Q8_0": "MOSTLY_Q8_0", "F32": "ALL_F32"}


def quantize(source: Path, out: Path, kind: str) -> None:
    """Quantize a float GGUF file as llama.cpp does it by default, without an importance matrix."""
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_{TYPES[kind]}")
    params.nthread = 1
    if status := lib.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize: status {status}")


def product_bits(path: Path) -> float:
    """Return the bits that a weight of the layers' products takes on average, scales included."""
    tensors = [each for each in gguf.GGUFReader(path).tensors if each.name.startswith("blk.") and len(each.shape) == 2]
    return 8 * sum(int(each.n_bytes) for each in tensors) / sum(int(each.n_elements) for each in tensors)


def write_logits(model_path: Path, ids: NDArray[np.int64], file: BinaryIO, threads: int) -> None:
    """Write the logits after each token of each sequence: float32 bytes, [sequences, length, vocab_size]."""
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(model_path).encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"{model_path}: llama.cpp cannot load it")
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    length = ids.shape[1]
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = length
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    batch: Any = lib.llama_batch_init(length, 0, 1)
    for row in ids:
        batch.n_tokens = length
        for i, token in enumerate(row):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        if status := lib.llama_decode(context, batch):
            raise SystemExit(f"llama_decode: status {status}")
        file.write(np.ctypeslib.as_array(lib.llama_get_logits(context), (length, vocab_size)).tobytes())


def main() -> None:
    """Quantize, write the logits, and print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path, help="a float GGUF file")
    parser.add_argument("kind", choices=TYPES)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder for the quantized model")
    parser.add_argument("--logits", type=argparse.FileType("wb"), required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    model = args.scratch / "model.gguf"
    start = time.perf_counter()
    quantize(args.source, model, args.kind)
    seconds = time.perf_counter() - start
    write_logits(model, np.load(args.ids), args.logits, args.threads)
    print(json.dumps({"size_bytes": model.stat().st_size, "product_bits": product_bits(model), "seconds": seconds}))


if __name__ == "__main__":
    main()
