"""What is built from this tree holds all of it, and works once installed, away from the tree."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = ["galerne", "cli", "export", "optimize", "runtime", "targets"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _installed_as(path: Path) -> str:
    """Return a file's place in site-packages: runtime/bundle.py installs as galerne/runtime/bundle.py."""
    return path.as_posix() if path.parts[0] == "galerne" else f"galerne/{path.as_posix()}"


def _source_files(root: Path = ROOT) -> list[Path]:
    """Return every file under the code folders, relative to the root, but for what tools leave there and notes."""
    found = (file.relative_to(root) for folder in CODE for file in (root / folder).rglob("*") if file.is_file())
    return sorted(f for f in found if "__pycache__" not in f.parts and f.suffix != ".md" and f.name[0] != ".")


def _run(command: list[str | Path], cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in [*CODE, "tests"]:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    _run([sys.executable, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"], tree)
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as an installer does it: what the sdist lacks, the wheel lacks."""
    out = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, sdist], out)
    (file,) = out.iterdir()
    return file


def _environment(folder: Path) -> Path:
    """Make a virtual environment that has our dependencies, but not our own package. Returns its Python."""
    _run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    site = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    # A folder named in a .pth file joins the path, while the .pth files in it, our editable install's too, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _install(python: Path, *what: str | Path) -> None:
    options = ["-q", "--no-deps", "--no-build-isolation"]
    _run([sys.executable, "-m", "pip", "--python", python, "install", *options, *what], python.parent)


def _works(python: Path, elsewhere: Path) -> list[str]:
    """Check the package and its command from another folder; return the files that its modules came from."""
    modules = ["galerne", "galerne.runtime.bundle", "galerne.runtime.manifest", "galerne.cli.main"]
    program = f"import sys, {', '.join(modules)}\nfor m in {modules}: print(sys.modules[m].__file__)"
    origins = _run([python, "-c", program], elsewhere)
    assert "Usage: galerne" in _run([python.parent / "galerne", "--help"], elsewhere)
    return origins.split()


def test_package_list_equals_the_tree() -> None:
    folders = {file.parent for file in _source_files() if file.suffix == ".py"}
    setuptools = PYPROJECT["tool"]["setuptools"]
    expected = {_installed_as(folder).replace("/", "."): folder.as_posix() for folder in folders}
    assert setuptools["package-dir"] == expected
    assert setuptools["packages"] == sorted(setuptools["packages"])
    assert set(setuptools["packages"]) == set(expected)


def test_every_folder_of_code_is_a_package() -> None:
    folders = {file.parent for file in _source_files()}
    assert {folder.as_posix() for folder in folders if not (ROOT / folder / "__init__.py").is_file()} == set()


def test_version_is_the_package_s(wheel: Path) -> None:
    version = _run([sys.executable, "-c", "import galerne; print(galerne.__version__)"], ROOT).strip()
    assert wheel.name == f"galerne-{version}-py3-none-any.whl"


def test_wheel_holds_every_file_and_nothing_else(wheel: Path, tree: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (licence,) = (name for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
        assert b"Apache License" in archive.read(licence)
    assert names == {_installed_as(file) for file in _source_files(tree)}
    assert "galerne/py.typed" in names
    assert not any("test" in Path(name).name for name in names)


def test_sdist_holds_every_file(sdist: Path, tree: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {file.as_posix() for file in _source_files(tree)} <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_wheel_works_once_installed(wheel: Path, tmp_path: Path) -> None:
    python = _environment(tmp_path / "venv")
    _install(python, wheel)
    origins = _works(python, tmp_path)
    assert all(Path(origin).is_relative_to(tmp_path / "venv") for origin in origins), origins


def test_editable_install_works(tree: Path, tmp_path: Path) -> None:
    python = _environment(tmp_path / "venv")
    _install(python, "-e", tree)
    origins = _works(python, tmp_path)
    assert all(Path(origin).is_relative_to(tree) for origin in origins), origins


def test_constraints_pin_each_requirement_once() -> None:
    """A requirement that constraints.txt does not pin could change under the tests from one day to the next."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==")[0] for line in lines if line and not line.startswith("#")]
    pinned = [_normal(pin) for pin in pins]
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["export"], *extras["rtx"], *extras["dev"]]
    assert len(set(pinned)) == len(pinned)
    assert {_normal(line.partition(">=")[0]) for line in required} - set(pinned) == set()


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")
