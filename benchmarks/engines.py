"""Time, memory and size of engines that TensorRT-RTX builds ahead of time: `python -m benchmarks.engines --work DIR`.

For each model and each type, every compute capability that takes the type. Each build is a `galerne build` in a process of its
own, and its engine is removed again; the bundles stay in the folder and are used again. No GPU is needed or used.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import child
from benchmarks.published import markdown
from galerne.cli.demo import smollm2
from galerne.errors import GalerneError
from galerne.progress import say
from galerne.runtime.bundle import ENGINES, Bundle
from galerne.targets.target import load

STACK = "tensorrt-rtx-1.7"
# A target of each compute capability; each type by the type that a target must have for it.
TARGETS = ("t4", "a100-80gb", "a10", "l4", "rtx-5090", "dgx-spark")
TYPES = {"fp16": "float16", "bf16": "bfloat16", "int8": "int8", "int4-rtn": "int4", "fp8": "fp8"}
MODELS = ("tiny-mistral", "smollm2", "1.1b")
_GALERNE = (sys.executable, "-c", "from galerne.cli.main import run; run()")


@dataclass(frozen=True)
class Build:
    """What one build took; sizes are in bytes."""

    model: str
    type: str
    target: str
    compute_capability: str | None
    weights_bytes: int
    engine_bytes: int
    seconds: float
    cpu_seconds: float
    peak_anon_bytes: int | None
    peak_rss_bytes: int


def measure(
    work: Path, models: list[str], types: list[str], targets: list[str], checkpoint: Path | None
) -> list[Build]:
    """Export what is not there and build all that the targets take.

    Args:
        checkpoint: the one of 1.1 B weights; by default it is made.
    """
    builds = []
    for model in models:
        for kind in types:
            bundle = _bundle(work, model, kind, checkpoint)
            for name in targets:
                if TYPES[kind] in load(name).stack(STACK).types:
                    builds.append(_build(bundle, model, kind, name))
    return builds


def _bundle(work: Path, model: str, kind: str, checkpoint: Path | None) -> Path:
    out = work / "engines" / model / kind
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    source, choice = _source(work, model, checkpoint), ["--recipe", kind]
    if kind == "fp8":
        source, choice = _made(out.with_name("fp8-checkpoint"), "fp8-checkpoint", source), []
    child.run([*_GALERNE, "export", source, "--out", out, *choice])
    return out


def _source(work: Path, model: str, checkpoint: Path | None) -> Path:
    if model == "tiny-mistral":
        return child.ROOT / "examples" / "tiny-mistral"
    if model == "smollm2":
        return smollm2()
    return checkpoint or _made(work / "checkpoint", "checkpoint", work)


def _made(out: Path, form: str, source: Path) -> Path:
    if not out.exists():
        child.run([sys.executable, "-m", "benchmarks.models", form, source, out])
    return out


def _build(bundle: Path, model: str, kind: str, name: str) -> Build:
    finished = child.run([*_GALERNE, "build", bundle, "--target", name, "--stack", STACK, "--force", "--json"])
    built = Bundle.open(bundle)
    weights = built.manifest.files["weights.bin"].size
    shutil.rmtree(bundle / ENGINES)
    built.with_files(f"{ENGINES}/{name}", [])
    build = Build(
        model,
        kind,
        name,
        load(name).compute_capability,
        weights,
        json.loads(finished.stdout)["size_bytes"],
        finished.seconds,
        finished.cpu_seconds,
        finished.peak_anon_bytes,
        finished.peak_rss_bytes,
    )
    say(json.dumps(asdict(build)))  # a long series that is broken off has still given these
    return build


def table(builds: list[Build]) -> str:
    """Return the builds as a Markdown table, one line for a model and a type; the range is over the compute capabilities."""
    head = [
        "model",
        "type",
        "compute capabilities",
        "weights MB",
        "engine MB",
        "s",
        "CPU s",
        "peak RssAnon MB",
        "peak RSS MB",
    ]
    rows = []
    for key in dict.fromkeys((build.model, build.type) for build in builds):
        own = [build for build in builds if (build.model, build.type) == key]
        sizes = ([b.engine_bytes / 1e6 for b in own], [b.seconds for b in own], [b.cpu_seconds for b in own])
        memory = ([(b.peak_anon_bytes or 0) / 1e6 for b in own], [b.peak_rss_bytes / 1e6 for b in own])
        capabilities = ", ".join(str(b.compute_capability) for b in own)
        weights = f"{own[0].weights_bytes / 1e6:.0f}"
        rows.append([*key, capabilities, weights, *map(_range, (*sizes, *memory))])
    return markdown([head, *rows])


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def main() -> int:
    """Parse the command line, build, and print a Markdown table or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the folder of benchmarks.peers, reused")
    parser.add_argument("--checkpoint", type=Path, help="the checkpoint of 1.1 B weights, if it lies elsewhere")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--types", nargs="*", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), metavar="NAME")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    try:
        builds = measure(args.work.resolve(), args.models, args.types, args.targets, args.checkpoint)
    except GalerneError as exc:
        say(f"error: {exc}")
        return exc.exit_code
    print(json.dumps({"builds": [asdict(build) for build in builds]}) if args.json else table(builds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
