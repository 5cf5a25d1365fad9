"""Lays out the benchmark's folder: which tools can run here, and each one's model, made once."""

import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import child
from galerne.errors import BackendError
from galerne.progress import say, step

GALERNE, LLAMA_CPP, GENAI = "Galerne", "llama.cpp", "onnxruntime-genai"
_PACKAGES = {LLAMA_CPP: "llama-cpp-python", GENAI: "onnxruntime-genai"}


@dataclass(frozen=True)
class Tool:
    """One tool that can run: its name and version, the Python that has it, its module here, its model, more options."""

    name: str
    version: str
    python: Path
    module: str
    model: Path
    options: tuple[str, ...] = ()


def prepare(work: Path, peers_python: Path) -> list[Tool]:
    """Make what is missing and return the tools, Galerne first; a peer that is not installed is left out with a line.

    Args:
        work: the benchmark's folder, some 10 GB; made if it is not there.
        peers_python: the Python that has the peers.
    """
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = make(work, "checkpoint", "checkpoint")
    bundle = make(work, "bundle", "int4-rtn")
    make(work, "engine", "int4-rtn", again=True)
    own = Path(sys.executable)
    tools = [Tool(GALERNE, _version(own, "galerne") or "", own, "benchmarks.peer_galerne", bundle)]
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


def build_genai(python: Path, checkpoint: Path, out: Path) -> child.Finished:
    """Run onnxruntime-genai's builder at int4 for the CPU, all else by default, and say what it took.

    Its defaults are symmetric blocks of 32 and int8 activations. `out` appears whole.

    Raises: BackendError if the builder fails.
    """
    staging, cache = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.cache")
    shutil.rmtree(staging, ignore_errors=True)
    command: list[str | Path] = [python, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    command += ["-i", checkpoint, "-o", staging, "-c", cache]
    finished = child.run(command, cwd=out.parent)
    os.replace(staging, out)
    shutil.rmtree(cache, ignore_errors=True)
    return finished


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
