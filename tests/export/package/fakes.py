"""A box that is not there: a root folder with what install.sh looks at, its commands, and a stand-in for TensorRT.

The stand-in builds nothing and its engine computes with the portable graph in ONNX Runtime; asked to, it computes something else.
What runs for real: install.sh, the wheel's unpacking, Galerne from the package, its checks of the plan, the replay.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

TENSORRT = '''
"""Takes what compile.py tells TensorRT, and gives four bytes for an engine."""
import os, time
from enum import IntEnum

__version__ = os.environ.get("FAKE_TENSORRT", "10.3.0")

class ILogger: pass
class IProgressMonitor: pass
BuilderFlag = IntEnum("BuilderFlag", ["WEIGHT_STREAMING"])
NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"])

class Network:
    num_inputs = 0

class OnnxParser:
    def __init__(self, network, log): pass
    def parse(self, data, path): return len(data) > 0

class Cache:
    def serialize(self): return b"timings"

class Config:
    progress_monitor = None
    def set_flag(self, flag): pass
    def add_optimization_profile(self, profile): return 0
    def create_timing_cache(self, data): return Cache()
    def set_timing_cache(self, cache, ignore): return True
    def get_timing_cache(self): return Cache()

class Profile:
    def set_shape(self, name, *sizes): pass

class Builder:
    def __init__(self, log): pass
    def create_network(self, flags): return Network()
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        time.sleep(float(os.environ.get("FAKE_BUILD_S", "0")))
        return None if os.environ.get("FAKE_BUILD") == "fails" else b"made"
'''

PATCHES = '''
"""Puts a GPU of 8.7 in Galerne's sight, and an engine that needs none in the place of TensorRT's."""
import importlib.abc, importlib.machinery, os, sys

def library(module):
    module.compute_capability_here = lambda: "8.7"

def select(module):
    real = module.open_engine
    def open_engine(bundle, name=None, **options):
        if name in (None, "portable", "cpu"):
            return real(bundle, name, **options)
        record = module.load_record(bundle, name)
        assert bundle.file(f"engines/{name}/{record.file}").read_bytes() == b"made"
        engine = module.OrtEngine(
            bundle.file("model.onnx"), bundle.manifest, name=name, options=module.session_options(exact=True, threads=1)
        )
        if os.environ.get("FAKE_ENGINE") == "wrong":
            run = engine.run
            engine.run = lambda *given: run(*given) * 1.2
        return engine
    module.open_engine = open_engine

PATCHES = {
    "galerne.optimize.builders.tensorrt.library": library,
    "galerne.runtime.engines.select": select,
}

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            PATCHES[name](module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
'''

COMMANDS = {
    "uname": "echo ${FAKE_MACHINE:-aarch64}",
    "nvpmodel": 'printf "NV Power Mode: MAXN_SUPER\\n%s\\n" "${FAKE_POWER:-0}"',
    "dpkg-query": """
        case $4 in
            nvidia-jetpack) version=${FAKE_JETPACK-6.2+b77} ;;
            tensorrt) version=${FAKE_TENSORRT_PACKAGE-10.3.0.30-1+cuda12.5} ;;
        esac
        [ -n "${version:-}" ] || exit 1
        printf %s "$version"
    """,
    "systemctl": """
        echo "$*" >>"$FAKE_LOG"
        [ "$1" != restart ] || [ "$(readlink "$FAKE_ROOT/opt/galerne/tiny/current")" != "${FAKE_BROKEN:-}" ]
    """,
    "df": """
        [ -z "${FAKE_FREE_KB:-}" ] || { printf 'head\\nfs 1 1 %s 1%% /\\n' "$FAKE_FREE_KB"; exit; }
        exec /bin/df "$@"
    """,
}


@dataclass
class Box:
    """A box. environment: what the stand-ins are told."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def make(folder: Path, python: str = sys.executable) -> "Box":
        """Make one in an empty folder."""
        root, fakes = folder / "root", folder / "fakes"
        for place in (root / "etc", root / "proc", fakes / "bin", fakes / "python"):
            place.mkdir(parents=True)
        (root / "etc" / "nv_tegra_release").write_text(
            "# R36 (release), REVISION: 4.3, BOARD: generic, EABI: aarch64\n"
        )
        (root / "proc" / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 12000000 kB\n")
        for name, body in COMMANDS.items():
            file = fakes / "bin" / name
            file.write_text(f"#!/bin/sh\n{body}\n")
            file.chmod(0o755)
        (fakes / "python" / "tensorrt.py").write_text(TENSORRT)
        (fakes / "python" / "sitecustomize.py").write_text(PATCHES)
        wrapper = fakes / "python3"
        wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={fakes}/python exec {python} "$@"\n')
        wrapper.chmod(0o755)
        environment = {
            "PATH": f"{fakes}/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "GALERNE_PYTHON": str(wrapper),
            "GALERNE_SYSTEMCTL": "systemctl",
            "FAKE_ROOT": str(root),
            "FAKE_LOG": str(folder / "systemctl.log"),
        }
        return Box(root, environment)

    @property
    def base(self) -> Path:
        """The bundle's folder on it."""
        return self.root / "opt" / "galerne" / "tiny"

    @property
    def current(self) -> str | None:
        """The version in use."""
        link = self.base / "current"
        return link.readlink().name if link.is_symlink() else None

    def _command(self, package: Path, options: tuple[str, ...]) -> list[str]:
        return ["/bin/sh", str(package / "install.sh"), "--root", str(self.root), *options]

    def install(self, package: Path, *options: str, **told: str) -> "subprocess.CompletedProcess[str]":
        """Run a package's install.sh to its end."""
        environment = {**self.environment, **told}
        return subprocess.run(
            self._command(package, options), env=environment, capture_output=True, text=True, check=False, timeout=600
        )

    def killed(self, package: Path, marks: list[str], **told: str) -> bool:
        """Run install.sh and kill all of it, without a warning, as soon as one of these files is there.

        Returns: whether it was killed before it was done.
        """
        process = subprocess.Popen(
            self._command(package, ()),
            env={**self.environment, **told},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not any(any(self.root.glob(mark)) for mark in marks):
            time.sleep(0.002)
        running = process.poll() is None
        if running:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return running

    def tree(self) -> dict[str, tuple[int, int, str]]:
        """Return what is installed: each path with its inode, its time and where it points."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            status = path.lstat()
            points = str(path.readlink()) if path.is_symlink() else ""
            found[str(path.relative_to(self.root))] = (status.st_ino, status.st_mtime_ns, points)
        return found
