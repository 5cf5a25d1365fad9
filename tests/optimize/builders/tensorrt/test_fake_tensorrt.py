"""The path of plain TensorRT, against `fake_tensorrt`: its versions, its timing cache, its options, and the GPU it wants."""

import dataclasses
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galerne.errors import BackendError, InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.optimize.builders.build import build, choose_stack
from galerne.optimize.builders.tensorrt.build_plan import NETWORK, PLAN, load_plan
from galerne.optimize.builders.tensorrt.compile import ENGINE, TIMING_CACHE, compile_plan
from galerne.optimize.builders.tensorrt.library import compute_capability_here
from galerne.optimize.builders.tensorrt.options import Options
from galerne.optimize.builders.tensorrt.plan import plan
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.record import load_record
from galerne.targets.target import NumberType, Stack, load

TYPES: tuple[NumberType, ...] = ("float32", "float16", "bfloat16", "int8", "int4")
JETPACK_6 = Stack(
    "jetpack-6.2", "tensorrt", TYPES, "primitive", "device", ("a test",), "10.3", "tensorrt-10.3", "12.6", "3.10"
)
JETPACK_7 = Stack("jetpack-7.2", "tensorrt", TYPES, "opset24", "device", ("a test",), "10.16", None, "13.2", "3.12")
PLAIN = Stack("tensorrt-11", "tensorrt", TYPES, "opset24", "gpu", ("a test",))
ORIN = dataclasses.replace(
    load("a10"),
    name="orin",
    kind="jetson",
    compute_capability="8.7",
    unified_memory=True,
    stacks=(JETPACK_7, JETPACK_6),
)
A10 = dataclasses.replace(load("a10"), stacks=(PLAIN,))
Fake = Callable[..., Any]

pytestmark = pytest.mark.tensorrt


@pytest.fixture(scope="module")
def primitive(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("primitive") / "fp16"
    return export(open_checkpoint(checkpoint_folder), recipe.load("fp16"), out, chunk=8, dialect="primitive")


@pytest.fixture
def opset24(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> Bundle:
    return copy(bundle_of("fp16"), tmp_path / "bundle")


def copy(bundle: Bundle, out: Path) -> Bundle:
    shutil.copytree(bundle.path, out)
    return Bundle.open(out)


@pytest.mark.parametrize(
    ("version", "stack", "flags", "streamed"),
    [("10.3.0", JETPACK_6, 1, False), ("10.16.2", JETPACK_7, 1, True), ("11.1.0", PLAIN, 0, True)],
)
def test_each_version_is_told_what_it_takes(
    fake_tensorrt: Fake,
    primitive: Bundle,
    opset24: Bundle,
    tmp_path: Path,
    version: str,
    stack: Stack,
    flags: int,
    streamed: bool,
) -> None:
    told = fake_tensorrt(version)
    bundle = copy(primitive, tmp_path / "primitive") if stack.dialect == "primitive" else opset24
    target = dataclasses.replace(ORIN, stacks=(stack,))
    record = load_record(build(bundle, target), "orin")
    assert (told.network_flags, told.streamed) == ([flags], streamed)
    assert told.flags == ({"EDITABLE_TIMING_CACHE"} if streamed else set())
    assert (record.backend, record.backend_version, record.stack) == ("tensorrt", version, stack.name)
    assert (record.compute_capability, record.cuda) == ("8.7", stack.cuda)
    assert record.platform == f"linux-{platform.machine()}"
    assert [(p.name, p.tokens) for p in record.profiles] == [("decode", (1, 1, 1)), ("prefill", (1, 8, 8))]
    assert record.timing_cache == TIMING_CACHE
    assert (bundle.path / "engines/orin" / ENGINE).stat().st_size > 100_000


def test_the_version_on_the_box_must_be_the_stacks(fake_tensorrt: Fake, primitive: Bundle, tmp_path: Path) -> None:
    fake_tensorrt("10.16.2")
    bundle = copy(primitive, tmp_path / "bundle")
    with pytest.raises(
        BackendError, match=r"jetpack-6.2 has version 10\.3 of tensorrt, found 10\.16\.2; choose another"
    ):
        build(bundle, ORIN, stack=JETPACK_6)
    assert not (bundle.path / "engines/orin").exists()


@pytest.mark.parametrize(("gpu", "found"), [(None, "no GPU with a driver"), ("8.6", "a GPU of 8.6")])
def test_another_gpu_is_refused_and_the_package_named(
    fake_tensorrt: Fake, opset24: Bundle, gpu: str | None, found: str
) -> None:
    fake_tensorrt("10.16.2", gpu)
    with pytest.raises(
        BackendError, match=rf"expected one of compute capability 8\.7, found {found}; .*galerne package"
    ):
        build(opset24, ORIN, stack=JETPACK_7)


def test_a_stack_is_chosen_by_what_is_installed(fake_tensorrt: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = dataclasses.replace(load("a10").stack("tensorrt-rtx-1.7"))
    both = dataclasses.replace(A10, stacks=(PLAIN, rtx))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert choose_stack(both)[0] == rtx
    assert choose_stack(ORIN) == (JETPACK_7, "its first; TensorRT is not installed here, nor another's builder")
    assert choose_stack(both, "tensorrt-11") == (PLAIN, "as --stack says")
    fake_tensorrt("10.3.0")
    assert choose_stack(both) == (PLAIN, "TensorRT 10.3.0 is installed here")
    assert choose_stack(ORIN) == (JETPACK_6, "TensorRT 10.3.0 is installed here")
    versions = tuple(dataclasses.replace(PLAIN, name=version, version=version) for version in ("11", "10.16", "10.3"))
    assert choose_stack(dataclasses.replace(A10, stacks=versions))[0].name == "10.3"
    fake_tensorrt("10.14.1")
    assert choose_stack(dataclasses.replace(A10, stacks=versions)) == (
        versions[0],
        "TensorRT 10.14.1 is installed here, though what is known of it is of 11",
    )
    assert choose_stack(ORIN)[1].startswith("its first")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert choose_stack(dataclasses.replace(A10, stacks=(rtx,)))[1].startswith(
        "its first; TensorRT-RTX is not installed"
    )


def test_a_locked_rebuild_measures_nothing(fake_tensorrt: Fake, opset24: Bundle) -> None:
    told = fake_tensorrt("10.16.2", "8.6")
    with pytest.raises(InputError, match=r"--locked: .*timing\.cache: no timing cache of an earlier build"):
        build(opset24, A10, locked=True)
    bundle = build(opset24, A10)
    assert len(told.measured) == 2
    first = bundle.manifest.files[f"engines/a10/{TIMING_CACHE}"]
    told = fake_tensorrt("10.16.2", "8.6")
    bundle = build(bundle, A10, locked=True)
    assert told.measured == []
    assert "ERROR_ON_TIMING_CACHE_MISS" in told.flags
    assert bundle.manifest.files[f"engines/a10/{TIMING_CACHE}"] == first
    # Another profile was never measured, so a locked build of it fails, and what was there stays.
    with pytest.raises(BackendError, match="a tactic is not in the timing cache"):
        build(bundle, A10, options=Options(draft=3), locked=True)
    Bundle.open(bundle.path).verify_hashes()
    bundle = build(bundle, A10, options=Options(draft=3), force=True)
    assert len(told.measured) == 1


def test_a_timing_cache_of_another_version(
    fake_tensorrt: Fake, opset24: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    fake_tensorrt("10.16.2", "8.6")
    bundle = build(opset24, A10)
    told = fake_tensorrt("11.1.0", "8.6")
    with pytest.raises(BackendError, match=r"--locked: --target a10: .*another GPU or version than TensorRT 11\.1\.0"):
        build(bundle, A10, locked=True)
    build(bundle, A10, force=True)
    assert "making a new one" in caplog.text
    assert len(told.measured) == 2


def test_a_timing_cache_that_was_changed_is_refused(fake_tensorrt: Fake, opset24: Bundle) -> None:
    fake_tensorrt("10.16.2", "8.6")
    bundle = build(opset24, A10)
    bundle.file(f"engines/a10/{TIMING_CACHE}").write_bytes(b"10.16.2|other")
    with pytest.raises(InputError, match=r"timing\.cache: its SHA-256 is .* the file was changed"):
        build(bundle, A10, locked=True)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (Options(weights="streamed"), {"WEIGHT_STREAMING"}),
        (Options(weights="stripped"), {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        (Options(version_compatible=True), {"VERSION_COMPATIBLE"}),
        (Options(hardware_compatibility="ampere_plus"), set()),
        (Options(hardware_compatibility="same_compute_capability"), set()),
    ],
)
def test_options_reach_tensorrt_and_the_record(
    fake_tensorrt: Fake, opset24: Bundle, options: Options, flags: set[str]
) -> None:
    told = fake_tensorrt("11.1.0", "8.6")
    record = load_record(build(opset24, A10, options=options), "a10")
    assert told.flags == flags | {"EDITABLE_TIMING_CACHE"}
    assert told.hardware_compatibility == options.hardware_compatibility.upper()
    assert record.weights == options.weights
    assert record.version_compatible is options.version_compatible
    assert record.hardware_compatibility == options.hardware_compatibility
    # A stripped engine is refitted by the names in its graph, so that lies beside it.
    assert (opset24.path / "engines/a10" / NETWORK).is_file() is (options.weights == "stripped")


def test_the_two_files_of_a_plan_are_enough(fake_tensorrt: Fake, primitive: Bundle, tmp_path: Path) -> None:
    fake_tensorrt("10.3.0")
    package, out = tmp_path / "package", tmp_path / "out"
    package.mkdir()
    out.mkdir()
    made = plan(primitive, ORIN, JETPACK_6, package)
    (package / WEIGHTS).write_bytes(primitive.file(WEIGHTS).read_bytes())
    loaded = load_plan(package / PLAN)
    assert loaded == made
    record = compile_plan(loaded, package / NETWORK, package / WEIGHTS, out)
    assert sorted(path.name for path in out.iterdir()) == [ENGINE, TIMING_CACHE]
    assert record.inputs == {name: primitive.manifest.files[name].sha256 for name in (GRAPH, WEIGHTS)}
    (package / NETWORK).write_bytes((package / NETWORK).read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"network\.onnx: its SHA-256 is not the plan's"):
        compile_plan(loaded, package / NETWORK, package / WEIGHTS, out)
    with pytest.raises(InputError, match=r"other\.bin: expected a file named weights\.bin"):
        compile_plan(loaded, package / NETWORK, package / "other.bin", out)


def test_a_bad_plan_names_its_field(primitive: Bundle, tmp_path: Path) -> None:
    plan(primitive, ORIN, JETPACK_6, tmp_path)
    tree = json.loads((tmp_path / PLAN).read_text())
    for changed, message in (
        ({"profiles": []}, "profiles: expected at least one"),
        ({"backend": "other"}, "backend: expected one of tensorrt"),
        ({"schema_version": 9}, "schema_version: expected 1, found 9"),
    ):
        (tmp_path / PLAN).write_text(json.dumps(tree | changed))
        with pytest.raises(InputError, match=rf"build\.json: {message}"):
            load_plan(tmp_path / PLAN)


def test_a_builder_that_does_not_start_gives_the_reason(
    fake_tensorrt: Fake, opset24: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt("11.1.0", "8.6")

    def fail(log: Any) -> None:
        log.log(sys.modules["tensorrt"].ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt"], "Builder", fail)
    with pytest.raises(BackendError, match=r"TensorRT 11\.1\.0 does not start here: CUDA initialization failure"):
        build(opset24, A10)


COMPILE = """
import ast, sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"onnx", "onnx_ir", "torch", "google", "tomllib", "tensorrt", "tensorrt_rtx"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import galerne.optimize.builders.tensorrt.compile
for name, module in sys.modules.items():
    if name.split(".")[0] == "galerne":
        ast.parse(open(module.__file__).read(), feature_version=(3, 10))
"""


def test_compiling_needs_neither_onnx_nor_python_3_11() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_gpu_is_asked_without_failing() -> None:
    found = compute_capability_here()
    assert found is None or float(found) >= 5
