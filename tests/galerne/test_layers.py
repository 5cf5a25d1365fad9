"""Imports point one way, and what a device does not have installed stays out of what runs there.

    targets <- runtime <- optimize <- export <- cli,  with galerne's root below them all

Everything is read from the tree, so a new file is held to this by being there.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ["targets", "runtime", "optimize", "export", "cli"]

# The extras, by the names they import as.
EXPORT_ONLY = {
    "accelerate",
    "gguf",
    "ml_dtypes",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "polygraphy",
    "safetensors",
    "torch",
    "transformers",
}
# What some devices have: imported in a function, where it is used, and not at the top of a module.
BACKENDS = {"cuda", "tensorrt", "tensorrt_rtx"}


def _files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def _name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "galerne" else ["galerne", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of each import, wherever it stands; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _allowed(layer: str, imported: str) -> bool:
    head, *rest = imported.split(".")
    if head in LAYERS or head == "":
        return False  # a folder's name without galerne before it, or a relative import
    if head != "galerne" or not rest or rest[0] not in LAYERS:
        return True  # not ours, or the ground floor
    return layer in LAYERS and LAYERS.index(rest[0]) <= LAYERS.index(layer)


@pytest.mark.parametrize("layer", ["galerne", *LAYERS])
def test_imports_point_one_way(layer: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {imported}"
        for file in _files(layer)
        for line, imported in _imports(file)
        if not _allowed(layer, imported)
    ]
    assert not wrong, "\n".join(["imports against the direction, relative, or without galerne before them:", *wrong])


@pytest.mark.parametrize(
    ("layer", "imported", "allowed"),
    [
        ("runtime", "galerne.targets.target.load", True),
        ("runtime", "galerne.errors.InputError", True),
        ("runtime", "galerne.runtime.bundle", True),
        ("runtime", "numpy", True),
        ("runtime", "galerne.optimize", False),
        ("targets", "galerne.runtime.bundle", False),
        ("export", "galerne.cli.main", False),
        ("galerne", "galerne.targets", False),
        ("cli", "galerne.export.trace.trace", True),
        ("cli", "export.trace", False),
        ("cli", ".main", False),
    ],
)
def test_the_rule_itself(layer: str, imported: str, allowed: bool) -> None:
    assert _allowed(layer, imported) is allowed


def test_errors_import_nothing() -> None:
    assert list(_imports(ROOT / "galerne" / "errors.py")) == []


def test_devices_need_no_export_library() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {imported}"
        for file in _files("galerne", "targets", "runtime")
        for line, imported in _imports(file)
        if imported.split(".")[0] in EXPORT_ONLY
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", [_name(f) for f in _files("galerne", *LAYERS) if f.name == "__init__.py"])
def test_init_files_import_the_standard_library_only(package: str) -> None:
    folder = ROOT / package.removeprefix("galerne.").replace(".", "/")
    imported = [name for _, name in _imports(folder / "__init__.py")]
    assert [name for name in imported if name.split(".")[0] not in sys.stdlib_module_names] == []


BLOCKED_IMPORT = """
import importlib, sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

blocked = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
for name in sys.argv[2:]:
    importlib.import_module(name)
print(*sorted(sys.modules))
"""


def _import_without(blocked: set[str], modules: list[str]) -> set[str]:
    """Import the modules in a new interpreter that lacks `blocked`; return every module that was loaded."""
    command = [sys.executable, "-c", BLOCKED_IMPORT, ",".join(sorted(blocked)), *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_blocker_blocks() -> None:
    with pytest.raises(AssertionError, match="json is not installed here"):
        _import_without({"json"}, ["galerne.runtime.manifest"])


@pytest.mark.parametrize("layer", ["targets", "runtime", "cli"])
def test_imports_without_any_extra(layer: str) -> None:
    """Every module of the layer, and `cli` too: its commands import what is heavy when they run."""
    modules = [_name(file) for file in _files("galerne", layer)]
    assert set(modules) <= _import_without(EXPORT_ONLY | BACKENDS, modules)


def test_help_is_instant() -> None:
    """The command line's entry loads neither the runtime's libraries nor the other layers."""
    loaded = _import_without(EXPORT_ONLY | BACKENDS, ["galerne.cli.main"])
    assert loaded & {"numpy", "onnxruntime", "tokenizers", "galerne.optimize", "galerne.export"} == set()


# What a module makes once and nobody changes: it may look like state, so each is named here.
CONSTANT_CALLS = {"TypeVar", "frozenset", "compile", "getLogger", "_byte_values", "SamplingOptions", "dtype"}


def _state(file: Path) -> Iterator[str]:
    """Yield what a module could keep between two calls: rebound globals, caches of functions, mutable objects of its own."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{file.name}:{node.lineno}: global {', '.join(node.names)}"
        elif isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if "cache" in ast.unparse(decorator):
                    yield f"{file.name}:{node.lineno}: @{ast.unparse(decorator)}"
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        value = node.value
        called = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else None
        empty = isinstance(value, ast.List | ast.Dict | ast.Set) and not ast.unparse(value).strip("[]{}")
        if empty or (called is not None and called not in CONSTANT_CALLS):
            yield f"{file.name}:{node.lineno}: {ast.unparse(node)}"


def test_the_runtime_keeps_no_global_state() -> None:
    """A program that embeds it may hold any number of models, in any threads, and they share nothing."""
    assert [found for file in _files("runtime", "targets") for found in _state(file)] == []


def test_the_rule_on_state_itself(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(
        "import functools\nseen = {}\nlock = Lock()\nBYTES = {'a': 1}\n@functools.lru_cache\ndef f():\n    global seen\n"
    )
    assert len(list(_state(file))) == 4
