"""Time and memory of an export, beside other tools' and `cp`: `python -m benchmarks.export_memory --work DIR`.

Each export is a process of its own. Beside its time stand the peak of its resident set (`ru_maxrss`, in which pages of mapped
files count while they stay), that of its anonymous memory (`RssAnon`, not to be dropped), and the size of what it wrote,
which is removed again. `cp` of the checkpoint is what the disk allows. A tool that fails is a line that says how.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import child
from benchmarks.prepare import GENAI, OPTIMUM, genai_command, make, optimum_command, peer_version
from galerne.errors import BackendError, GalerneError
from galerne.progress import say

_MB = 1e6


@dataclass(frozen=True)
class Export:
    """What one export took. Sizes are in MB of 10^6 bytes; null with `failed` where it did not come to its end."""

    name: str
    seconds: float | None
    cpu_seconds: float | None
    peak_anon_mb: float | None
    peak_rss_mb: float | None
    written_mb: float | None
    other_cores: float | None
    failed: str | None = None


def measure_exports(work: Path, checkpoint: Path | None, genai: Path, optimum: Path, only: list[str]) -> list[Export]:
    """Export a checkpoint, by default the benchmark's own, with each tool that is there.

    Args:
        genai, optimum: the Pythons that have onnxruntime-genai and optimum-onnx.
        only: parts of the names of what to run; all where there are none.
    """
    work.mkdir(parents=True, exist_ok=True)
    source = make(work, "checkpoint", "checkpoint") if checkpoint is None else checkpoint
    own = Path(sys.executable)
    with tempfile.TemporaryDirectory(prefix="exports-", dir=work) as folder:
        out = Path(folder) / "out"
        runs: list[tuple[str, list[str | Path]]] = [("cp", ["cp", "-r", source, out])]
        for kind, name in (("fp16-bundle", "Galerne fp16"), ("bundle", "Galerne int4-rtn")):
            runs.append((name, [own, "-m", "benchmarks.models", kind, source, out]))
        if (version := peer_version(genai, GENAI)) is not None:
            runs.append((f"{GENAI} {version} int4", genai_command(genai, source, out, Path(folder) / "cache")))
        if (version := peer_version(optimum, OPTIMUM)) is not None:
            runs.append((f"{OPTIMUM} {version} fp16", optimum_command(optimum, source, out)))
        return [
            _export(name, command, out)
            for name, command in runs
            if not only or any(part in name.split() for part in only)
        ]


def _export(name: str, command: list[str | Path], out: Path) -> Export:
    os.sync()  # what was written before shall not be counted here
    try:
        finished = child.run(command)
    except BackendError as exc:
        say(f"{name}: {exc}")
        return Export(name, None, None, None, None, None, None, str(exc)[-200:])
    finally:
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        shutil.rmtree(out, ignore_errors=True)
    anon = None if finished.peak_anon_bytes is None else finished.peak_anon_bytes / _MB
    sizes = (anon, finished.peak_rss_bytes / _MB, written / _MB)
    export = Export(name, finished.seconds, finished.cpu_seconds, *sizes, finished.other_cores)
    say(f"{name}: {export.seconds:.0f} s")
    return export


def main() -> int:
    """Parse the command line, run the exports, and print a Markdown table or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_memory", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the folder of benchmarks.peers, reused")
    parser.add_argument(
        "--checkpoint", type=Path, help="a checkpoint to export, such as one that `galerne synth` wrote"
    )
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable), help="the Python that has the peers")
    parser.add_argument(
        "--optimum-python", type=Path, default=Path(sys.executable), help="the one that has optimum-onnx"
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="cp, fp16, int4-rtn, a peer's name")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    try:
        exports = measure_exports(
            args.work.resolve(),
            args.checkpoint and args.checkpoint.resolve(),
            args.peers_python.absolute(),
            args.optimum_python.absolute(),
            args.only,
        )
    except GalerneError as exc:
        say(f"error: {exc}")
        return exc.exit_code
    if args.json:
        print(json.dumps({"exports": [asdict(export) for export in exports]}))
        return 0
    print("| export | s | its CPU s | peak RssAnon MB | peak RSS MB | written MB | cores busy with others |")
    print("|---" * 7 + "|")
    for export in exports:
        figures = (export.seconds, export.cpu_seconds, export.peak_anon_mb, export.peak_rss_mb, export.written_mb)
        cells = [export.failed or "-" if figure is None else f"{figure:.0f}" for figure in figures]
        cells.append("-" if export.other_cores is None else f"{export.other_cores:.1f}")
        print(f"| {export.name} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
