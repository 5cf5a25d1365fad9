"""What every tool is asked to do, so that all are timed alike. Needs numpy only: it runs in each tool's own environment."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

WARM_UP_TOKENS = 32
VOCAB_SIZE = 32000
# Ids 0 to 2 are <unk>, <s> and </s>: one that ends the text has no place inside a prompt.
_FIRST_ID = 3


class Session(Protocol):
    """A loaded model of some tool, with the one sequence that it holds."""

    def reset(self) -> None:
        """Forget the sequence."""

    def feed(self, tokens: list[int]) -> int:
        """Append tokens to the sequence and return the likeliest next one."""


@dataclass(frozen=True)
class Request:
    """The command line of a tool's process: the model's path, how much to run, and whether its file may be mapped."""

    model: Path
    prompt: int
    decode: int
    threads: int
    mapped: bool


def read_request() -> Request:
    """Parse the command line that `peers.py` gives to each tool's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    for name in ("prompt", "decode", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument(
        "--not-mapped", dest="mapped", action="store_false", help="for a tool that maps unless told not to"
    )
    return Request(**vars(parser.parse_args()))


def measure(request: Request, tool: str, load: Callable[[Request], Session]) -> None:
    """Load, warm up, prefill, decode, and print one JSON line.

    It holds `tool`, `load_s`, `prefill_tokens_per_s`, `decode_tokens_per_s` (of the median step) and `tokens`, the greedy
    tokens. Loading ends when the model can take its first token; importing the tool's package is not part of it.
    """
    random = np.random.default_rng(0)
    warm_up, prompt = (
        random.integers(_FIRST_ID, VOCAB_SIZE, count).tolist() for count in (WARM_UP_TOKENS, request.prompt)
    )
    start = time.perf_counter()
    session = load(request)
    load_s = time.perf_counter() - start
    session.feed([session.feed(warm_up)])  # a prompt and a step
    session.reset()
    start = time.perf_counter()
    tokens = [session.feed(prompt)]
    prefill_s = time.perf_counter() - start
    steps = []
    for _ in range(request.decode):
        start = time.perf_counter()
        tokens.append(session.feed(tokens[-1:]))
        steps.append(time.perf_counter() - start)
    result = {
        "tool": tool,
        "load_s": load_s,
        "prefill_tokens_per_s": request.prompt / prefill_s,
        "decode_tokens_per_s": 1 / float(np.median(steps)),
        "tokens": tokens,
    }
    print(json.dumps(result))
