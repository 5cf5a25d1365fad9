"""Time and memory of an export, beside onnxruntime-genai's builder: `python -m benchmarks.export_memory --work DIR`.

Peak RSS is `ru_maxrss` of the exporting process, and beside it what that is above the same Python with torch imported. What the
exports write is removed again. Pages of the mapped checkpoint count as soon as they are touched and as long as they stay.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import child
from benchmarks.prepare import GENAI, build_genai, make, peer_version
from galerne.errors import GalerneError
from galerne.progress import say


@dataclass(frozen=True)
class Export:
    """What one export took. Sizes are in MB of 10^6 bytes."""

    name: str
    seconds: float
    peak_rss_mb: float
    above_torch_mb: float


def measure_exports(work: Path, peers_python: Path) -> list[Export]:
    """Export the benchmark's checkpoint with Galerne at fp16 and int4, and with onnxruntime-genai at int4 if it is there.

    Raises: BackendError if one of them fails.
    """
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, own = make(work, "checkpoint", "checkpoint"), Path(sys.executable)
    results = []
    with tempfile.TemporaryDirectory(prefix="exports-", dir=work) as folder:
        out = Path(folder) / "out"
        for kind, name in (("fp16-bundle", "Galerne fp16"), ("bundle", "Galerne int4-rtn")):
            finished = child.run([own, "-m", "benchmarks.models", kind, checkpoint, out])
            results.append(_export(name, finished, own))
            shutil.rmtree(out)
        if (version := peer_version(peers_python, GENAI)) is not None:
            results.append(_export(f"{GENAI} {version} int4", build_genai(peers_python, checkpoint, out), peers_python))
    return results


def main() -> int:
    """Parse the command line, run the exports, and print a Markdown table or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_memory", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the folder of benchmarks.peers, reused")
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable), help="the Python that has the peers")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    try:
        exports = measure_exports(args.work.resolve(), args.peers_python.absolute())
    except GalerneError as exc:
        say(f"error: {exc}")
        return exc.exit_code
    if args.json:
        print(json.dumps({"exports": [asdict(export) for export in exports]}))
        return 0
    print("| export | s | peak RSS MB | above Python with torch MB |\n|---|---|---|---|")
    for export in exports:
        print(f"| {export.name} | {export.seconds:.0f} | {export.peak_rss_mb:.0f} | {export.above_torch_mb:.0f} |")
    return 0


def _export(name: str, finished: child.Finished, python: Path) -> Export:
    base = child.run([python, "-c", "import torch"]).peak_rss_bytes
    peak = finished.peak_rss_bytes
    export = Export(name, finished.seconds, peak / 1e6, (peak - base) / 1e6)
    say(f"{name}: {export.seconds:.0f} s, {export.peak_rss_mb:.0f} MB, {export.above_torch_mb:.0f} MB above torch")
    return export


if __name__ == "__main__":
    sys.exit(main())
