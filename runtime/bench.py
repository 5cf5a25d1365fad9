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
from galerne.runtime.engines.ort_pool import CUDA
from galerne.runtime.engines.select import CPU, PORTABLE
from galerne.runtime.footprint import decode_weight_bytes, forms_of, seen_cache_bytes
from galerne.runtime.model import Model
from galerne.runtime.rows import Rows
from galerne.targets.target import load as load_target

_PROBE_BYTES = 1 << 29
_PROBE_ROUNDS = 5
_WARM_UP = 32  # tokens
# Steps of a turn: the threads of the engine that ran before go on spinning for a moment, which the median step does not see.
_TURN = 8
_NOISE = 0.05  # a share; medians of a bundle beside itself differed by 3 % on a machine with seven times more work than cores


@dataclass(frozen=True)
class Beside:
    """Two bundles decoding by turns in one process, so that a machine that slows down slows both. Rates in tokens per second.

    engine: what ran the other one.
    decode_tokens_per_s: of the bundle. beside_tokens_per_s: of the other one.
    """

    engine: str
    decode_tokens_per_s: float
    beside_tokens_per_s: float

    @property
    def slower(self) -> bool:
        """Whether the bundle decodes slower than the other, by more than such a measurement is off by itself."""
        return self.decode_tokens_per_s < self.beside_tokens_per_s * (1 - _NOISE)


@dataclass(frozen=True)
class BenchResult:
    """Rates in tokens per second, times in seconds, sizes in bytes.

    bandwidth_bytes_per_s: measured where a CPU runs the bundle, and of the data sheet where a target's GPU does; None where it
        is not known which GPU does.
    bound_tokens_per_s: bandwidth over the bytes that one decode step must read: weights, keys and values seen, the adapter.
    """

    engine: str
    prompt_tokens: int
    decode_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    load_s: float
    peak_rss_bytes: int
    bandwidth_bytes_per_s: float | None
    bound_tokens_per_s: float | None


def bench(
    model: Model, *, prompt_tokens: int = 512, decode_tokens: int = 40, adapter: Adapter | None = None
) -> BenchResult:
    """Prefill a prompt of random tokens and decode after it; the decode rate is that of the median step.

    Raises: InputError if the bundle's longest context is shorter.
    """
    prompt = _prompt(model, prompt_tokens, decode_tokens)
    # Warm up: a GPU's libraries choose their kernels in the first run of a size, of which a prompt has as many as a chunk.
    on_cpu = model.engine.name in (PORTABLE, CPU)
    model.rows(adapter=adapter).feed([prompt[: _WARM_UP if on_cpu else model.graph.chunk]])
    rows = model.rows(adapter=adapter)
    start = time.perf_counter()
    rows.feed([prompt])
    prefill_s = time.perf_counter() - start
    steps = _steps(rows, prompt[0], decode_tokens)
    peak, bandwidth = peak_rss_bytes(), bandwidth_of(model.engine.name)
    length, bytes_per_value = prompt_tokens + decode_tokens, model.engine.ring_dtype.itemsize
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
        bound_tokens_per_s=None if bandwidth is None else bandwidth / read,
    )


def bench_beside(model: Model, other: Model, *, prompt_tokens: int = 512, decode_tokens: int = 40) -> Beside:
    """Decode with two bundles by turns, some steps each, after prompts of the same length; the median steps count.

    Raises: InputError if one's longest context is shorter.
    """
    prompts = [_prompt(each, prompt_tokens, decode_tokens) for each in (model, other)]
    rows = [each.rows() for each in (model, other)]
    for each, prompt in zip(rows, prompts, strict=True):
        each.feed([prompt])
    steps: tuple[list[float], list[float]] = ([], [])
    for first in range(0, decode_tokens, _TURN):
        for each, prompt, found in zip(rows, prompts, steps, strict=True):
            found += _steps(each, prompt[0], min(_TURN, decode_tokens - first))
    own, beside = (1 / float(np.median(found)) for found in steps)
    return Beside(other.engine.name, own, beside)


def _prompt(model: Model, prompt_tokens: int, decode_tokens: int) -> list[int]:
    limit = model.graph.max_context
    if limit is not None and prompt_tokens + decode_tokens > limit:
        raise InputError(
            f"--prompt-tokens {prompt_tokens} and --decode-tokens {decode_tokens}: the longest context is {limit}"
        )
    ids: list[int] = np.random.default_rng(0).integers(0, model.facts.vocab_size, prompt_tokens).tolist()
    return ids


def _steps(rows: Rows, token: int, count: int) -> list[float]:
    """Decode the same token `count` times and return the seconds that each step took."""
    found = []
    for _ in range(count):
        start = time.perf_counter()
        rows.feed([[token]])
        found.append(time.perf_counter() - start)
    return found


def bandwidth_of(engine: str) -> float | None:
    """Return the bytes a second that an engine, by its name, can read its weights at; see `BenchResult`."""
    if engine in (PORTABLE, CPU):
        return memory_bandwidth()
    return None if engine == CUDA else load_target(engine).bandwidth_bytes_per_s


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
