"""ONNX Runtime with the rings on a device: its CUDA provider where there is a GPU. Elsewhere the device is the CPU, so that
the lowered graphs and the bookkeeping are tried."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from galerne.errors import BackendError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.parity.verify import verify
from galerne.runtime.bundle import GRAPH, Bundle
from galerne.runtime.engines import select
from galerne.runtime.engines.ort import session_options
from galerne.runtime.engines.ort_cuda import open_cuda_provider
from galerne.runtime.engines.ort_device import DeviceEngine
from galerne.runtime.generate import Generation
from galerne.runtime.model import Model

BundleOf = Callable[[str], Bundle]
IDS = np.random.default_rng(5).integers(0, 501, 200).tolist()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `--engine cuda` open with the CPU for a device."""

    def opened(bundle: Bundle, *, exact: bool, threads: int | None) -> DeviceEngine:
        options = session_options(exact=True, threads=threads)
        return DeviceEngine(bundle.file(GRAPH), bundle.manifest, device="cpu", options=options)

    monkeypatch.setattr(select, "open_cuda_provider", opened)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("recipe", ["fp32", "fp16"])
def test_the_parity_suite_passes(bundle_of: BundleOf, checkpoint_folder: Path, recipe: str) -> None:
    report = verify(bundle_of(recipe), open_checkpoint(checkpoint_folder), engine="cuda")
    assert report.passed, [case for case in report.cases if not case.passed]


@pytest.mark.usefixtures("on_cpu")
def test_rings_stay_where_they_are_and_sessions_move(
    bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of("fp32")
    with Model.open(bundle.path, "portable", exact=True) as portable, Model.open(bundle.path, "cuda") as model:
        assert model.engine.name == "cuda"
        expected, session = portable.session(), model.session()
        expected.append(IDS[:40])
        session.append(IDS[:40])
        rows = model.rows()
        rows.feed([IDS[:5]])
        before = [value.data_ptr() for value in rows.cache.rings.values]  # type: ignore[attr-defined]
        rows.feed([IDS[5:50]])
        assert [value.data_ptr() for value in rows.cache.rings.values] == before  # type: ignore[attr-defined]
        session.save(tmp_path / "saved")
        twin, loaded = session.fork(), portable.load_session(tmp_path / "saved")
        for token in IDS[40:60]:
            for each in (expected, session, twin, loaded):
                each.append([token])
            for each in (session, twin, loaded):
                assert np.array_equal(each.logits, expected.logits)
        for ring in session.cache:
            ring[...] = np.nan  # copies
        session.append([1])
        assert np.isfinite(session.logits).all()
        rows.close()
        assert rows.cache.rings.values == []  # type: ignore[attr-defined]


@pytest.mark.usefixtures("on_cpu")
def test_a_growing_ring_keeps_its_slots(checkpoint_folder: Path, bundle_of: BundleOf, tmp_path: Path) -> None:
    """A longer window than a new ring's 128 slots, so that it grows twice on the way."""
    from galerne.export.export import export
    from galerne.optimize.quantize import recipe
    from tests.conftest import save_mistral

    checkpoint = open_checkpoint(save_mistral(tmp_path / "checkpoint", sliding_window=300))
    bundle = export(checkpoint, recipe.load("fp32"), tmp_path / "bundle", chunk=16)

    def generated(engine: str) -> list[int]:
        with Model.open(bundle.path, engine, exact=engine == "portable") as model:
            generation = Generation(model, [IDS[:100]], max_new_tokens=260, ignore_eos=True)
            return [token for _, token in generation]

    assert generated("cuda") == generated("portable")


def test_without_the_provider_it_is_one_line(bundle_of: BundleOf) -> None:
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(
        BackendError,
        match=r"--engine cuda: ONNX Runtime .* has no CUDAExecutionProvider; `pip uninstall onnxruntime`, then",
    ):
        Model.open(bundle_of("fp32").path, "cuda")
    with pytest.raises(BackendError, match="takes no bfloat16"):
        open_cuda_provider(bundle_of("bf16"), exact=False, threads=None)


def test_a_provider_that_does_not_start_is_one_line(bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime warns and goes on with the CPU, which nobody asked for."""
    import onnxruntime as ort

    session = functools.partial(ort.InferenceSession)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda graph, options, providers: session(graph, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(
        BackendError, match="CUDAExecutionProvider of ONNX Runtime .* does not start: it needs an NVIDIA driver"
    ):
        Model.open(bundle_of("fp32").path, "cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4-rtn"])
def test_the_cuda_provider_passes_the_parity_suite(bundle_of: BundleOf, checkpoint_folder: Path, recipe: str) -> None:
    report = verify(bundle_of(recipe), open_checkpoint(checkpoint_folder), engine="cuda")
    assert report.passed, [case for case in report.cases if not case.passed]


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_sessions_on_the_gpu(bundle_of: BundleOf, tmp_path: Path) -> None:
    """What a session does with its rings is the same on the device: growing, a fork, a file, going back."""
    bundle = bundle_of("fp32")
    with Model.open(bundle.path, "portable", exact=True) as portable, Model.open(bundle.path, "cuda") as model:
        expected, session = portable.session(), model.session()
        expected.append(IDS[:40])
        session.append(IDS[:40])
        session.save(tmp_path / "saved")
        twin, loaded = session.fork(), model.load_session(tmp_path / "saved")
        for token in IDS[40:150]:
            for each in (expected, session, twin, loaded):
                each.append([token])
            assert np.array_equal(twin.logits, session.logits)
            assert np.array_equal(loaded.logits, session.logits)
            assert np.abs(session.logits - expected.logits).max() < 1e-3
        before = session.logits.copy()
        session.rewind(1)
        session.append([IDS[149]])
        assert np.array_equal(session.logits, before)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_the_gpu_writes_what_the_cpu_writes(bundle_of: BundleOf) -> None:
    bundle = bundle_of("fp32")

    def generated(engine: str, speculate: int) -> list[int]:
        with Model.open(bundle.path, engine, exact=engine == "portable") as model:
            generation = Generation(model, [IDS[:100]], max_new_tokens=200, ignore_eos=True, speculate=speculate)
            return [token for _, token in generation]

    expected = generated("portable", 0)
    assert generated("cuda", 0) == expected
    assert generated("cuda", 4) == expected
