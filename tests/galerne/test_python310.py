"""JetPack 6 has Python 3.10: what a box runs uses nothing newer.

Newer syntax does not parse, as far as Python's parser can be told so, and ruff's target version refuses it too. Newer parts of
the standard library are found by asking a Python 3.10, where one is installed, for all that the code takes from it.
"""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["galerne", "targets", "runtime", "optimize", "cli"]

ASK = """
import importlib, sys
for line in sys.stdin:
    where, module, name = line.rstrip("\\n").split("\\t")
    try:
        found = importlib.import_module(module)
    except ImportError:
        print(f"{where}: no module {module}")
        continue
    if name and not hasattr(found, name):
        try:
            importlib.import_module(f"{module}.{name}")
        except ImportError:
            print(f"{where}: {module} has no {name}")
"""


def _python310() -> str | None:
    homes = sorted(Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10"))
    return str(homes[-1]) if homes else shutil.which("python3.10")


def _guarded(tree: ast.Module) -> set[ast.AST]:
    """Return what stands under `if sys.version_info >= ...`: never run where it is not there."""
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "version_info" in ast.unparse(node.test)]
    return {inner for node in tests for statement in node.body for inner in ast.walk(statement)}


def _taken(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, module and name (or "") of all that code takes from the standard library."""
    tree = ast.parse(text, feature_version=(3, 10))
    guarded = _guarded(tree)
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.lineno, node.module, alias.name
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            if module in sys.modules:  # a module, and not a class or function of one
                yield node.lineno, module, node.attr


def _missing(texts: dict[str, str]) -> list[str]:
    python = _python310()
    if python is None:
        pytest.skip("no Python 3.10 is installed here")
    lines = {
        f"{where}:{line}\t{module}\t{name}"
        for where, text in texts.items()
        for line, module, name in _taken(text)
        if module.split(".")[0] in sys.stdlib_module_names
    }
    done = subprocess.run(
        [python, "-I", "-c", ASK], input="\n".join(sorted(lines)), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_standard_library_is_that_of_python_310() -> None:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert _missing({str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}) == []


def test_the_rule_itself() -> None:
    text = (
        "import sys\nimport tomllib\nimport hashlib\nfrom enum import StrEnum\nfrom os import path\n"
        "hashlib.file_digest\nhashlib.sha256\n"
        "if sys.version_info >= (3, 11):\n    import wsgiref.types\n"
    )
    assert _missing({"m.py": text}) == [
        "m.py:2: no module tomllib",
        "m.py:4: enum has no StrEnum",
        "m.py:6: hashlib has no file_digest",
    ]


def test_newer_syntax_is_refused() -> None:
    with pytest.raises(SyntaxError):
        list(_taken("try:\n    print()\nexcept* ValueError:\n    print()\n"))
