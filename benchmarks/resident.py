"""Runs a bundle in this process and prints what of its memory is resident: one JSON line. For `benchmarks.fit_memory`."""

import argparse
import json
import re
from pathlib import Path

import numpy as np

from galerne.runtime.footprint import forms_of
from galerne.runtime.model import Model

# What Linux maps at once around a page of a file that is touched.
_FAULT_AROUND = 1 << 16
_DECODED = 8
_WARM_UP_CHUNK = 128


def resident_bytes() -> int:
    """Return this process's resident set. Source: /proc/self/status."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def touch_table(model: Model) -> None:
    """Feed tokens from all over the embedding table, so that all of its pages are resident, as after a long time of use."""
    row = model.facts.hidden_size * forms_of(model.bundle.manifest.recipe).compute_bytes
    ids = np.arange(0, model.facts.vocab_size, max(1, _FAULT_AROUND // row))
    for first in range(0, len(ids), _WARM_UP_CHUNK):
        rows = model.rows()
        rows.feed([ids[first : first + _WARM_UP_CHUNK]])
        rows.close()


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    model = Model.open(arguments.bundle, arguments.engine)
    touch_table(model)
    ids = np.random.default_rng(0).integers(0, model.facts.vocab_size, arguments.context)
    rows = model.rows(arguments.batch)
    rows.feed([ids[:-_DECODED]] * arguments.batch)
    for token in ids[-_DECODED:]:
        rows.feed([[int(token)]] * arguments.batch)
    print(json.dumps({"resident_bytes": resident_bytes()}))


if __name__ == "__main__":
    main()
