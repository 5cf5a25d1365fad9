"""What is refused before an engine is loaded, each in one line, without a GPU."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from galerne.cli.main import run
from galerne.errors import BackendError, GalerneError, InputError
from galerne.runtime.bundle import Bundle, entry_of
from galerne.runtime.engines.record import EngineRecord, load_record
from galerne.runtime.engines.tensorrt import driver
from galerne.runtime.engines.tensorrt.checks import check_capability, check_version
from galerne.runtime.engines.tensorrt.driver import Device
from galerne.runtime.engines.tensorrt.library import Library, open_library
from galerne.runtime.engines.tensorrt.open import open_tensorrt
from galerne.runtime.model import Model
from tests.runtime.engines.conftest import NAME, FakeGpu
from tests.runtime.engines.fake_cuda import FakeDriver

WithEngine = Callable[..., Bundle]
REBUILD = f"rebuild it with `galerne build .* --target {NAME} --force`"


def refused(bundle: Bundle, gpu: FakeGpu, kind: type[GalerneError], message: str) -> None:
    """Check that opening fails with one line, before anything is loaded, and leaves nothing on the GPU."""
    with pytest.raises(kind, match=message) as caught:
        Model.open(bundle.path, NAME)
    assert "\n" not in str(caught.value) and str(bundle.path) in str(caught.value)
    assert gpu.trt.loaded == 0 and gpu.driver.held == (0, 0, 0, 0)


def changed(bundle: Bundle, file: str) -> Bundle:
    """Change one byte in the middle of a file; its size stays."""
    path = bundle.file(file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return bundle


def test_one_changed_byte(with_engine: WithEngine, gpu: FakeGpu) -> None:
    bundle = changed(with_engine(), f"engines/{NAME}/engine.plan")
    refused(
        bundle,
        gpu,
        InputError,
        f"engine.plan: its SHA-256 is .*…, the manifest says .*…: the file was changed.*{REBUILD}",
    )


def test_a_changed_byte_is_told_where_there_is_no_gpu(with_engine: WithEngine, gpu: FakeGpu) -> None:
    def no_gpu() -> FakeDriver:
        raise BackendError("this machine has no NVIDIA driver")

    bundle = with_engine()
    for changes, kind, message in (
        (False, BackendError, "engine.plan: this machine has no NVIDIA driver"),
        (True, InputError, "the file was changed"),
    ):
        if changes:
            changed(bundle, f"engines/{NAME}/engine.plan")
        with pytest.raises(kind, match=message):
            open_tensorrt(bundle, load_record(bundle, NAME), library=gpu.library, driver=no_gpu)


def test_another_version(with_engine: WithEngine, gpu: FakeGpu) -> None:
    bundle = with_engine(backend_version="1.6.0.5")
    refused(bundle, gpu, BackendError, f"built by TensorRT-RTX 1.6.0.5, here is 1.7.1.116; .*{REBUILD}")


def test_another_capability(with_engine: WithEngine, gpu: FakeGpu) -> None:
    bundle = with_engine(compute_capability="12.0")
    refused(bundle, gpu, BackendError, "built for compute capability 12.0, the Fake GPU has 8.9; .*galerne build")


def test_another_bundles_weights(with_engine: WithEngine, gpu: FakeGpu) -> None:
    bundle = changed(with_engine(), "weights.bin")
    files = {**bundle.manifest.files, "weights.bin": entry_of(bundle.file("weights.bin"))}
    manifest = dataclasses.replace(bundle.manifest, files=files)
    bundle.file("manifest.json").write_bytes(manifest.to_json())
    refused(bundle, gpu, InputError, f"built from weights.bin .*…, but the bundle's is .*…; {REBUILD}")


def test_rings_of_another_size(with_engine: WithEngine, gpu: FakeGpu) -> None:
    bundle = with_engine(options={"capacities": [32]})
    refused(bundle, gpu, InputError, f"built with rings of 32 slots, the bundle's have 24; {REBUILD}")


def test_another_platform(with_engine: WithEngine, gpu: FakeGpu) -> None:
    refused(
        with_engine(platform="linux-riscv64"),
        gpu,
        BackendError,
        f"built for linux-riscv64, this machine is .*{REBUILD}",
    )


def test_an_older_driver(with_engine: WithEngine, gpu: FakeGpu) -> None:
    gpu.replace(FakeDriver(driver_version="12.6"))
    refused(with_engine(), gpu, BackendError, "built with CUDA 13, the driver here runs up to 12.6; update the driver")


def test_a_stripped_engines_graph_and_weights(with_engine: WithEngine, gpu: FakeGpu) -> None:
    """They are as much a part of it as its own file."""
    for file in (f"engines/{NAME}/network.onnx", "weights.bin"):
        refused(
            changed(with_engine(stripped=True), file), gpu, InputError, f"{file}: its SHA-256 is .*file was changed"
        )


def test_too_little_memory(with_engine: WithEngine, gpu: FakeGpu) -> None:
    gpu.replace(FakeDriver(memory_bytes=100_000))
    refused(with_engine(), gpu, BackendError, "GB of GPU memory and more to run, 0.0 GB are free")


def test_what_is_no_engine_is_one_line(with_engine: WithEngine, gpu: FakeGpu) -> None:
    """Of the right hash, so it was built that way: TensorRT's own words, and nothing left on the GPU."""
    bundle = with_engine()
    plan = bundle.file(f"engines/{NAME}/engine.plan")
    plan.write_bytes(b"not an engine")
    bundle = bundle.with_files(f"engines/{NAME}", [f"engines/{NAME}/{file}" for file in ("engine.json", "engine.plan")])
    with pytest.raises(
        BackendError, match="engine.plan: TensorRT-RTX .* cannot load it: Serialization assertion failed$"
    ):
        Model.open(bundle.path, NAME)
    assert gpu.driver.held == (0, 0, 0, 0) and gpu.driver.closed


def test_an_engine_that_breaks_the_contract(with_engine: WithEngine, gpu: FakeGpu) -> None:
    """Profiles that leave out single tokens; another bundle's engine under a record that says otherwise."""
    only_chunks = [{"batch": [1, 1, 1], "tokens": [8, 8, 8], "logits": [1, 1, 1]}]
    with pytest.raises(InputError, match="no profile of it takes one token"):
        Model.open(with_engine("fp32", only_chunks).path, NAME)
    assert gpu.driver.held == (0, 0, 0, 0) and gpu.driver.closed


@pytest.mark.parametrize(
    ("compatible", "built", "here", "taken"),
    [
        (False, "10.16.2", "10.16.2", True),
        (False, "10.16.2", "10.16.3", False),
        (True, "10.13.0.35", "10.16.2", True),
        (True, "10.16.2", "10.13.0.35", False),
        (True, "10.16.2", "11.4.0", False),
    ],
)
def test_versions(with_engine: WithEngine, compatible: bool, built: str, here: str, taken: bool) -> None:
    bundle, record = _with_record(with_engine, backend="tensorrt", backend_version=built, version_compatible=compatible)
    if taken:
        check_version(bundle, record, here)
        return
    with pytest.raises(BackendError, match=f"built by TensorRT {built}, here is {here}; it loads in {built}.* only"):
        check_version(bundle, record, here)


@pytest.mark.parametrize(
    ("level", "built", "here", "taken"),
    [
        ("none", "8.9", "8.9", True),
        ("none", "8.0", "8.6", False),
        ("same_compute_capability", "8.6", "8.6", True),
        ("same_compute_capability", "8.6", "8.9", False),
        ("ampere_plus", "8.0", "9.0", True),
        ("ampere_plus", "8.0", "12.0", True),
        ("ampere_plus", "8.0", "7.5", False),
    ],
)
def test_capabilities(with_engine: WithEngine, level: str, built: str, here: str, taken: bool) -> None:
    bundle, record = _with_record(with_engine, hardware_compatibility=level, compute_capability=built)
    device = Device("GPU", here, "13.0")
    if taken:
        check_capability(bundle, record, device)
        return
    with pytest.raises(BackendError, match=f"compute capability .*{built}.*, the GPU has {here}"):
        check_capability(bundle, record, device)


def test_a_missing_library_says_what_to_install() -> None:
    with pytest.raises(
        BackendError,
        match=r"^TensorRT cannot be imported .* install galerne\[tensorrt\]; on a Jetson, JetPack",
    ):
        open_library("tensorrt")


def test_the_driver_is_asked_without_failing() -> None:
    count = driver.gpu_count()
    assert count is None or count >= 0


@pytest.mark.tensorrt
@pytest.mark.skipif(bool(driver.gpu_count()), reason="there is a GPU here, so the engine is opened")
def test_a_real_engine_is_checked_where_there_is_no_gpu(
    bundle_of: Callable[[str], Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From `galerne build` to the one line that `galerne generate` ends with: status 3 without a GPU, 2 for a changed byte."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX's Python package is not installed")
    folder = Path(shutil.copytree(bundle_of("fp16").path, tmp_path / "bundle"))

    def told(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            run([*arguments])
        return int(ended.value.code or 0), capsys.readouterr().err.strip().splitlines()[-1]

    assert told("build", str(folder), "--target", NAME)[0] == 0
    generate = ("generate", str(folder), "--prompt-ids", "1,2,3", "--engine", NAME)
    status, line = told(*generate)
    assert status == 3 and "engine.plan: " in line
    record = json.loads((folder / "engines" / NAME / "engine.json").read_text())
    assert record["backend_version"] and record["compute_capability"] == "8.9"
    changed(Bundle.open(folder), f"engines/{NAME}/engine.plan")
    status, line = told(*generate)
    assert status == 2 and "the file was changed" in line


@pytest.mark.tensorrt
def test_a_gpu_that_tensorrt_rtx_does_not_run_on(tmp_path: Path) -> None:
    """As an H200 answers, whatever the engine was built for: to build again would not help."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX's Python package is not installed")
    (tmp_path / "engine.plan").write_bytes(b"1234")
    found = trt.EngineValidity.INVALID, int(trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC)
    runtime = SimpleNamespace(engine_header_size=4, get_engine_validity=lambda head: found)
    with pytest.raises(
        BackendError, match=r"\(unsupported_cc\); it runs on no GPU of this kind: build for another stack"
    ):
        Library(trt, "tensorrt_rtx").check_header(runtime, tmp_path / "engine.plan")


def _with_record(with_engine: WithEngine, **changes: Any) -> tuple[Bundle, EngineRecord]:
    bundle = with_engine(**changes)
    return bundle, load_record(bundle, NAME)
