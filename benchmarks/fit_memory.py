"""Holds what `galerne fit` predicts of the CPU's memory against the resident memory of a process that runs the bundle.

    python -m benchmarks.fit_memory BUNDLE [BUNDLE ...] [--contexts 256 2048] [--batch 1] [--engines cpu portable]

prints the table of docs/measurements.md. A bundle needs its `cpu` engine for the engine of that name.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.child import run
from benchmarks.published import markdown
from galerne.optimize.fit.memory import on_cpu
from galerne.optimize.fit.workload import Workload
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines.select import CPU, PORTABLE
from galerne.runtime.footprint import forms_of


@dataclass(frozen=True)
class Comparison:
    """Bytes that one way of running a bundle takes: as predicted, and resident in a fresh process."""

    bundle: str
    engine: str
    context: int
    batch: int
    predicted_bytes: int
    resident_bytes: int

    @property
    def error(self) -> float:
        """The prediction over what is resident, less 1."""
        return self.predicted_bytes / self.resident_bytes - 1


def compare(path: Path, engine: str, context: int, batch: int = 1) -> Comparison:
    """Run a bundle in a process of its own and predict what it takes. Raises: BackendError if the process fails."""
    manifest = Bundle.open(path).manifest
    graph = manifest.graph
    ring = graph.max_context or context
    work = Workload(manifest.model, forms_of(manifest.recipe), context, batch, graph.chunk, max(ring, context))
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.resident", path.resolve(), "--engine", engine]
    out = run([*command, "--context", str(context), "--batch", str(batch)]).stdout
    predicted = on_cpu(work, widened=engine == CPU).total
    return Comparison(path.name, engine, context, batch, predicted, json.loads(out)["resident_bytes"])


def main() -> None:
    """Compare what the command line says and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--engines", nargs="+", default=[CPU, PORTABLE], choices=[CPU, PORTABLE])
    arguments = parser.parse_args()
    rows = [["bundle", "engine", "rows", "context", "predicted MB", "resident MB", "off by"]]
    for path in arguments.bundles:
        for engine in arguments.engines:
            for context in arguments.contexts:
                each = compare(path, engine, context, arguments.batch)
                figures = [f"{size / 1e6:.1f}" for size in (each.predicted_bytes, each.resident_bytes)]
                rows.append([each.bundle, engine, str(each.batch), str(context), *figures, f"{each.error:+.1%}"])
    print(markdown(rows))


if __name__ == "__main__":
    main()
