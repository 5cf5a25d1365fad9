"""One session of a hundred thousand tokens: is its memory flat, and its speed? `python -m benchmarks.long_session BUNDLE`.

Decodes token by token and prints one JSON object: for each stretch of `--stretch` tokens the rate in tokens per second (of the
median step, which others on the machine disturb least), and the resident memory at its end, in bytes. Stretches begin
where the ring has wrapped, so that all of them do the same work.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import psutil

from galerne.errors import GalerneError
from galerne.progress import say
from galerne.runtime.model import Model


@dataclass(frozen=True)
class Stretch:
    """Some thousand tokens of the session, `start` being the position of the first."""

    start: int
    tokens_per_s: float
    rss_bytes: int


def measure(model: Model, tokens: int, stretch: int) -> list[Stretch]:
    """Decode greedily until the session holds `tokens`."""
    process, stretches = psutil.Process(), []
    with model.session() as session:
        session.append(np.arange(max(model.graph.capacities) + 1) % model.facts.vocab_size)
        token = np.zeros(1, np.int64)
        while session.length + stretch <= tokens:
            start, steps = session.length, np.zeros(stretch)
            for step in range(stretch):
                token[0] = session.logits.argmax()
                before = time.perf_counter()
                session.append(token)
                steps[step] = time.perf_counter() - before
            stretches.append(Stretch(start, 1 / float(np.median(steps)), process.memory_info().rss))
            say(f"{session.length} tokens: {stretches[-1].tokens_per_s:.0f} tokens/s")
    return stretches


def main() -> int:
    """Parse the command line, run the session, and print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_session", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000, help="the session's length (default %(default)s)")
    parser.add_argument("--stretch", type=int, default=1000, help="tokens of a stretch (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime (default: one for each core)")
    options = parser.parse_args()
    try:
        with Model.open(options.bundle, threads=options.threads) as model:
            stretches = measure(model, options.tokens, options.stretch)
            engine, capacities = model.engine.name, model.graph.capacities
    except GalerneError as exc:
        print(f"long_session: {exc}", file=sys.stderr)
        return exc.exit_code
    result = {
        "engine": engine,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
        "capacities": capacities,
        "last_over_first": stretches[-1].tokens_per_s / stretches[0].tokens_per_s if stretches else None,
        "rss_growth_bytes": stretches[-1].rss_bytes - stretches[0].rss_bytes if stretches else None,
        "stretches": [asdict(stretch) for stretch in stretches],
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
