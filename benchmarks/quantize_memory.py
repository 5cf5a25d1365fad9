"""Time and memory of `galerne quantize` on a slice of a large model: `python -m benchmarks.quantize_memory --work DIR`.

The model has random weights in the shape of Mistral 7B v0.1, and as many of its layers as are asked for. Beside the time stand
the peak of the process's anonymous memory (`RssAnon`, not to be dropped), and that of its resident set (`ru_maxrss`), in which
pages of mapped files count while they stay: of the checkpoint, and of the activations, which lie in files.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import child
from galerne.errors import GalerneError
from galerne.export.calibrate.record import RECORD
from galerne.progress import say

_ALL_LAYERS = 32
_MB = 1e6


@dataclass(frozen=True)
class Quantized:
    """What one run took. Sizes are in MB of 10^6 bytes.

    layer_seconds: for each layer, the embedding of the text included. all_hours: for all layers of the model.
    """

    recipe: str
    tokens: int
    seconds: float
    cpu_seconds: float
    layer_seconds: float
    all_hours: float
    peak_anon_mb: float | None
    peak_rss_mb: float
    other_cores: float | None


def measure(work: Path, layers: int, recipes: list[str], tokens: int) -> list[Quantized]:
    """Quantize by each recipe in a process of its own; what it writes is removed again."""
    source, out = work / f"mistral-7b-{layers}", work / "quantized"
    work.mkdir(parents=True, exist_ok=True)
    own: list[str | Path] = [sys.executable, "-m", "galerne.cli"]
    if not source.exists():
        child.run([*own, "synth", "mistral-7b-v0.1", "--layers", str(layers), "--out", source])
        # Any tokenizer whose ids the model has will do.
        shutil.copy(child.ROOT / "examples" / "tiny-mistral" / "tokenizer.json", source)
    text = child.ROOT / "benchmarks" / "texts" / "calibration.txt"
    measured = []
    for recipe in recipes:
        shutil.rmtree(out, ignore_errors=True)
        command = [*own, "quantize", source, "--recipe", recipe, "--calibration", text, "--out", out]
        finished = child.run([*command, "--tokens", str(tokens)])
        first, last = out / RECORD, sorted(out.glob("model-*.safetensors"))[layers - 1]
        each = (last.stat().st_mtime - first.stat().st_mtime) / layers
        shutil.rmtree(out)
        measured.append(
            Quantized(
                recipe,
                tokens,
                finished.seconds,
                finished.cpu_seconds,
                each,
                each * _ALL_LAYERS / 3600,
                None if finished.peak_anon_bytes is None else finished.peak_anon_bytes / _MB,
                finished.peak_rss_bytes / _MB,
                finished.other_cores,
            )
        )
        say(f"{recipe}: {finished.seconds:.0f} s")
    return measured


def main() -> int:
    """Parse the command line, run, and print a Markdown table or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize_memory", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the checkpoint, reused")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    parser.add_argument("--recipes", nargs="*", default=["int4-gptq", "int4-awq"])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    try:
        measured = measure(args.work.resolve(), args.layers, args.recipes, args.tokens)
    except GalerneError as exc:
        say(f"error: {exc}")
        return exc.exit_code
    if args.json:
        print(json.dumps({"runs": [asdict(run) for run in measured]}))
        return 0
    print(
        "| recipe | tokens | s | CPU s | s a layer | h for 32 layers | peak RssAnon MB | peak RSS MB | cores busy with others |"
    )
    print("|---" * 9 + "|")
    for run in measured:
        anon = "-" if run.peak_anon_mb is None else f"{run.peak_anon_mb:.0f}"
        others = "-" if run.other_cores is None else f"{run.other_cores:.1f}"
        print(
            f"| {run.recipe} | {run.tokens} | {run.seconds:.0f} | {run.cpu_seconds:.0f} | {run.layer_seconds:.0f} "
            f"| {run.all_hours:.1f} | {anon} | {run.peak_rss_mb:.0f} | {others} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
