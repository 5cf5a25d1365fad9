"""Lays out the benchmark's folder: which tools can run here, and each one's model, made once."""

import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import child
from galerne.errors import BackendError
from galerne.progress import say, step

GALERNE, LLAMA_CPP, GENAI, OPTIMUM = "Galerne", "llama.cpp", "onnxruntime-genai", "optimum-onnx"
MODELOPT = "nvidia-modelopt"
_PACKAGES = {LLAMA_CPP: "llama-cpp-python", GENAI: "onnxruntime-genai", OPTIMUM: "optimum-onnx", MODELOPT: MODELOPT}


@dataclass(frozen=True)
class Tool:
    """One tool that can run: its name and version, the Python that has it, its module here, its model, more options.

    own: whether it is Galerne, with one model or another.
    """

    name: str
    version: str
    python: Path
    module: str
    model: Path
    options: tuple[str, ...] = ()
    own: bool = False


def prepare(work: Path, peers_python: Path) -> list[Tool]:
    """Make what is missing and return the tools, Galerne's first; a peer that is not installed is left out with a line.

    Args:
        work: the benchmark's folder, some 10 GB; made if it is not there.
        peers_python: the Python that has the peers.
    """
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = make(work, "checkpoint", "checkpoint")
    python = Path(sys.executable)
    here = _version(python, "galerne") or ""
    tools = []
    for name, kind, folder in (
        (GALERNE, "bundle", "int4-rtn"),
        (f"{GALERNE}, blocks of 256", "bundle-256", "int4-256"),
    ):
        bundle = make(work, kind, folder)
        make(work, "engine", folder, again=True)
        tools.append(Tool(name, here, python, "benchmarks.peer_galerne", bundle, own=True))
    if (version := peer_version(peers_python, LLAMA_CPP)) is not None:
        model = make(work, "gguf", "q4_0.gguf")
        llama_cpp = Tool(LLAMA_CPP, version, peers_python, "benchmarks.peer_llama_cpp", model)
        # Twice: it repacks the weights into memory of its own, beside the pages of the file where it maps that.
        not_mapped = replace(llama_cpp, name=f"{LLAMA_CPP}, not mapped", options=("--not-mapped",))
        tools += [llama_cpp, not_mapped]
    if (version := peer_version(peers_python, GENAI)) is not None:
        model = work / "genai"
        if not model.is_dir():
            with step("onnxruntime-genai's builder (about 8 GB of memory)"):
                build_genai(peers_python, checkpoint, model)
        tools.append(Tool(GENAI, version, peers_python, "benchmarks.peer_onnxruntime_genai", model))
    return tools


def make(work: Path, kind: str, name: str, *, again: bool = False) -> Path:
    """Make one format of `models.py` in a process of its own, unless it is there, and return its path."""
    out = work / name
    if again or not out.exists():
        with step(f"{kind}: {out}"):
            child.run([sys.executable, "-m", "benchmarks.models", kind, work / "checkpoint", out])
    return out


def build_genai(python: Path, checkpoint: Path, out: Path) -> None:
    """Run onnxruntime-genai's builder as `genai_command` says. `out` appears whole.

    Raises: BackendError if the builder fails.
    """
    staging, cache = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.cache")
    shutil.rmtree(staging, ignore_errors=True)
    child.run(genai_command(python, checkpoint, staging, cache), cwd=out.parent)
    os.replace(staging, out)
    shutil.rmtree(cache, ignore_errors=True)


def genai_command(python: Path, checkpoint: Path, out: Path, cache: Path) -> list[str | Path]:
    """Return the command of onnxruntime-genai's builder at int4 for the CPU, all else by default.

    Its defaults are symmetric blocks of 32 and int8 activations.
    """
    command: list[str | Path] = [python, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    return [*command, "-i", checkpoint, "-o", out, "-c", cache]


def optimum_command(python: Path, checkpoint: Path, out: Path) -> list[str | Path]:
    """Return the command of optimum-onnx's export at float16 with a cache; it has no int4 of its own."""
    command: list[str | Path] = [python, "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", checkpoint]
    return [*command, "--task", "text-generation-with-past", "--dtype", "fp16", "--no-post-process", out]


def peer_version(python: Path, tool: str) -> str | None:
    """Return the version of a peer in some Python; None, with a line on stderr, where that Python does not have it."""
    version = _version(python, _PACKAGES[tool])
    if version is None:
        say(f"{tool} is left out: {python} has no {_PACKAGES[tool]}; see benchmarks/README.md")
    return version


def _version(python: Path, package: str) -> str | None:
    """Return the version of a package in some Python, or None where that Python does not have it."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        return child.run([python, "-c", code]).stdout.strip()
    except (BackendError, OSError):
        return None
