"""Measures how fast a bundle runs here, beside the bound that memory bandwidth sets."""

import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from galerne.errors import InputError
from galerne.parallel import cores
from galerne.runtime.adapter import Adapter
from galerne.runtime.footprint import decode_weight_bytes, forms_of, seen_cache_bytes
from galerne.runtime.model import Model

_PROBE_BYTES = 1 << 29
_PROBE_ROUNDS = 5


@dataclass(frozen=True)
class BenchResult:
    """Rates in tokens per second, times in seconds, sizes in bytes.

    bound_tokens_per_s: bandwidth over the bytes that one decode step must read: weights, keys and values seen, the adapter.
    """

    engine: str
    prompt_tokens: int
    decode_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    load_s: float
    peak_rss_bytes: int
    bandwidth_bytes_per_s: float
    bound_tokens_per_s: float


def bench(
    model: Model, *, prompt_tokens: int = 512, decode_tokens: int = 40, adapter: Adapter | None = None
) -> BenchResult:
    """Prefill a prompt of random tokens and decode after it; the decode rate is that of the median step.

    Raises: InputError if the bundle's longest context is shorter.
    """
    limit = model.graph.max_context
    if limit is not None and prompt_tokens + decode_tokens > limit:
        raise InputError(
            f"--prompt-tokens {prompt_tokens} and --decode-tokens {decode_tokens}: the longest context is {limit}"
        )
    random = np.random.default_rng(0)
    prompt = random.integers(0, model.facts.vocab_size, prompt_tokens).tolist()
    model.rows(adapter=adapter).feed([prompt[:32]])  # warm up
    rows = model.rows(adapter=adapter)
    start = time.perf_counter()
    rows.feed([prompt])
    prefill_s = time.perf_counter() - start
    steps = []
    for _ in range(decode_tokens):
        start = time.perf_counter()
        rows.feed([prompt[:1]])
        steps.append(time.perf_counter() - start)
    peak, bandwidth = peak_rss_bytes(), memory_bandwidth()
    length, bytes_per_value = prompt_tokens + decode_tokens, model.engine.dtype.itemsize
    forms = forms_of(model.bundle.manifest.recipe)
    read = decode_weight_bytes(model.facts, forms) + seen_cache_bytes(model.facts, length, bytes_per_value)
    read += adapter.nbytes if adapter is not None else 0
    return BenchResult(
        engine=model.engine.name,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        prefill_tokens_per_s=prompt_tokens / prefill_s,
        decode_tokens_per_s=1 / float(np.median(steps)),
        load_s=model.load_s,
        peak_rss_bytes=peak,
        bandwidth_bytes_per_s=bandwidth,
        bound_tokens_per_s=bandwidth / read,
    )


def memory_bandwidth() -> float:
    """Return how many bytes a second all cores together read from memory: the best of several passes of a dot product."""
    threads = cores()
    parts = np.array_split(np.ones(_PROBE_BYTES // 4, np.float32), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PROBE_ROUNDS):
            start = time.perf_counter()
            list(pool.map(lambda part: float(np.dot(part, part)), parts))
            best = max(best, _PROBE_BYTES / (time.perf_counter() - start))
    return best


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
