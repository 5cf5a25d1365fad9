"""TensorRT engines on an NVIDIA GPU: built for the one that is here, and held to what the CPU engine is held to.

Run them by `make test-gpu`. Where there is no GPU each says what it lacks.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from galerne.errors import BackendError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.parity.verify import verify
from galerne.optimize.builders.build import build
from galerne.optimize.builders.tensorrt.options import Options
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines.tensorrt.cuda import CudaDriver, open_cuda
from galerne.runtime.engines.tensorrt.engine import TensorRTEngine
from galerne.runtime.generate import Generation
from galerne.runtime.model import Model
from galerne.targets.target import Stack, Target, load_all

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

BundleOf = Callable[[str], Bundle]
Built = Callable[..., tuple[Bundle, str]]
IDS = np.random.default_rng(6).integers(0, 501, 300).tolist()


@pytest.fixture(scope="module")
def driver() -> Iterator[CudaDriver]:
    """The GPU of this machine."""
    try:
        opened = open_cuda()
    except BackendError as exc:
        pytest.skip(str(exc))
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=["tensorrt_rtx", "tensorrt"])
def device(request: pytest.FixtureRequest, driver: CudaDriver) -> tuple[Target, Stack]:
    """A target that is this GPU, and its stack for one of the two libraries."""
    backend = request.param
    pytest.importorskip(backend, reason=f"the {backend} package is not installed")
    for target in load_all():
        if target.compute_capability == driver.device.compute_capability:
            for stack in target.stacks:
                if stack.backend == backend and stack.dialect == "opset24":
                    return target, stack
    pytest.skip(f"no target with a {backend} stack has compute capability {driver.device.compute_capability}")


@pytest.fixture
def built(bundle_of: BundleOf, device: tuple[Target, Stack], tmp_path: Path) -> Built:
    """Return a function that builds an engine of a recipe for this GPU."""

    def make(recipe: str, options: Options | None = None) -> tuple[Bundle, str]:
        target, stack = device
        copy = Bundle.open(Path(shutil.copytree(bundle_of(recipe).path, tmp_path / recipe)))
        return build(copy, target, stack=stack, options=options), target.name

    return make


def generated(bundle: Bundle, engine: str, count: int, speculate: int = 0) -> list[int]:
    with Model.open(bundle.path, engine, exact=engine == "portable") as model:
        generation = Generation(model, [IDS[:20]], max_new_tokens=count, ignore_eos=True, speculate=speculate)
        return [token for _, token in generation]


@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4-rtn"])
def test_the_parity_suite_passes(built: Built, checkpoint_folder: Path, recipe: str) -> None:
    """The whole of `galerne verify`: window edge, ring wrapped, rows of different lengths, poisoned cache."""
    bundle, name = built(recipe)
    report = verify(bundle, open_checkpoint(checkpoint_folder), engine=name)
    assert report.passed, [case for case in report.cases if not case.passed]


def test_parity_with_rows_together_and_drafts(built: Built, checkpoint_folder: Path) -> None:
    bundle, name = built("fp16", Options(batch=(1, 2, 4), draft=3))
    report = verify(bundle, open_checkpoint(checkpoint_folder), engine=name)
    assert report.passed, [case for case in report.cases if not case.passed]
    assert generated(bundle, name, 60, speculate=3) == generated(bundle, name, 60)


def test_rings_are_updated_in_place_and_steps_are_replayed(built: Built) -> None:
    bundle, name = built("fp16")
    with Model.open(bundle.path, name) as model:
        assert isinstance(model.engine, TensorRTEngine) and model.engine._plan.in_place
        rows = model.rows()
        rows.feed([IDS[:20]])
        for token in IDS[20:24]:
            rows.feed([[token]])
        step = rows.cache.groups[0]._steps[1, 1, 0]  # type: ignore[attr-defined]
        assert step._graph is not None


def test_a_replayed_graph_gives_what_a_run_gives(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, name = built("fp16")
    replayed = generated(bundle, name, 200)
    monkeypatch.setattr("galerne.runtime.engines.tensorrt.step.Step._record", lambda self, context: None)
    assert generated(bundle, name, 200) == replayed


def test_sessions_fork_rewind_and_move(built: Built, tmp_path: Path) -> None:
    bundle, name = built("fp16")
    with Model.open(bundle.path, name) as model:
        session = model.session()
        session.append(IDS[:40])
        session.save(tmp_path / "saved")
        twin, loaded = session.fork(), model.load_session(tmp_path / "saved")
        for token in IDS[40:60]:
            for each in (session, twin, loaded):
                each.append([token])
            assert np.array_equal(session.logits, twin.logits) and np.array_equal(session.logits, loaded.logits)
        session.rewind(5)
        session.append(IDS[55:60])
        np.testing.assert_allclose(session.logits, twin.logits, rtol=0, atol=0.05)


def test_models_that_are_closed_leave_no_gpu_memory(built: Built, driver: CudaDriver) -> None:
    bundle, name = built("fp16")

    def free() -> int:
        with driver.current():
            return driver.free_bytes()

    for cycle in range(25):
        with Model.open(bundle.path, name) as model:
            session = model.session()
            session.append(IDS[:20])
            session.append([1])
            session.append([2])
        if cycle == 4:
            before = free()
    assert before - free() < 16 << 20
