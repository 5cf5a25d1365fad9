"""Plain decoding and prompt lookup on an edit of code: `python -m benchmarks.speculation BUNDLE`.

The bundle is of a real chat model, such as SmolLM2. Both ways run by turns in one process; every round is a whole generation,
and ratios are taken within a round. It reports whether the tokens were the same, and never judges a time.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from galerne.runtime.generate import Generation
from galerne.runtime.model import Model
from galerne.runtime.prompt import Prompt, prompt_tokens

REQUEST = """Rewrite this Python class with the attribute `items` renamed to `entries`. Give the whole class.

```python
class Inventory:
    # Counts what is in stock.

    def __init__(self):
        self.items = {}
        self.history = []

    def add(self, name, count):
        if count < 1:
            raise ValueError("count must be at least 1")
        self.items[name] = self.items.get(name, 0) + count
        self.history.append(("add", name, count))

    def remove(self, name, count):
        if self.items.get(name, 0) < count:
            raise ValueError("not enough in stock")
        self.items[name] = self.items[name] - count
        self.history.append(("remove", name, count))

    def total(self):
        return sum(self.items.values())

    def report(self):
        for name, count in sorted(self.items.items()):
            print(name, count)
        print("total", self.total())
```"""


def main() -> int:
    """Parse the command line, run the rounds, and print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="generated in each run")
    parser.add_argument("--speculate", type=int, default=16, help="the longest draft in tokens")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    model = Model.open(args.bundle, threads=args.threads)
    prompt = prompt_tokens(model.bundle, Prompt(chat=REQUEST))
    rates: dict[int, list[float]] = {0: [], args.speculate: []}
    outputs, drafted = {}, 0
    for _ in range(args.rounds):
        for speculate in rates:
            generation = Generation(model, [prompt], max_new_tokens=args.tokens, speculate=speculate)
            for _ in generation:
                pass
            rates[speculate].append(generation.timings.decode_tokens_per_s)
            outputs[speculate] = generation.outputs[0].ids
            drafted = generation.timings.drafted_tokens
    plain, quick = rates[0], rates[args.speculate]
    result = {
        "engine": model.engine.name,
        "prompt_tokens": len(prompt),
        "output_tokens": len(outputs[0]),
        "drafted_tokens": drafted,
        "same_tokens": outputs[0] == outputs[args.speculate],
        "plain_tokens_per_s": statistics.median(plain),
        "speculated_tokens_per_s": statistics.median(quick),
        "ratio_in_a_round": sorted(round(b / a, 2) for a, b in zip(plain, quick, strict=True)),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
