"""The TensorRT engine's buffers and steps over a fake driver: nothing here ran on a GPU.

What computes is ONNX Runtime, on the graph as it was lowered for TensorRT; so the same tokens and the same parity mean that every
input, ring and slot was where it should be.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.verify import verify
from galerne.optimize.builders.tensorrt.options import Options
from galerne.optimize.quantize import recipe as recipes
from galerne.runtime.bundle import Bundle
from galerne.runtime.generate import Generation
from galerne.runtime.model import Model
from tests.export.test_layer_kinds import save_ministral
from tests.runtime.engines.conftest import NAME, FakeGpu
from tests.runtime.engines.fake_tensorrt import DECODE, enter_engine, prefill
from tests.runtime.test_session import greedy

WithEngine = Callable[..., Bundle]
CHUNK = 8  # of the bundles in conftest.py; their window is 16
IDS = np.random.default_rng(3).integers(0, 501, 400).tolist()
ANY_LOGITS = {"batch": [1, 2, 3], "tokens": [1, CHUNK, CHUNK], "logits": [1, 1, CHUNK]}


def tokens(bundle: Bundle, engine: str, prompts: list[list[int]], count: int, speculate: int = 0) -> list[list[int]]:
    with Model.open(bundle.path, engine, exact=engine == "portable") as model:
        generation = Generation(model, prompts, max_new_tokens=count, ignore_eos=True, speculate=speculate)
        for _ in generation:
            pass
        return [output.ids for output in generation.outputs]


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int4-rtn"])
def test_fake_driver_generates_the_portable_graphs_tokens(with_engine: WithEngine, gpu: FakeGpu, recipe: str) -> None:
    """Twice around the ring; each token after the first decoded one replays the recorded graph."""
    bundle = with_engine(recipe)
    found = tokens(bundle, NAME, [IDS[:13]], 60)
    assert found == tokens(bundle, "portable", [IDS[:13]], 60)
    assert gpu.driver.counts["launch"] == 58  # the first of 60 comes with the prompt, the second is run and recorded
    assert gpu.driver.held == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("profiles", "settings"),
    [
        ([DECODE, prefill(CHUNK)], {}),
        (None, {"in_place": False}),
        ([{**DECODE, "batch": [1, 1, 3]}, ANY_LOGITS], {}),
        ([{**DECODE, "batch": [1, 1, 2]}, {**ANY_LOGITS, "batch": [1, 1, 2]}], {"in_place": False}),
    ],
    ids=["one row, one logit", "two sets of rings", "three rows, all logits", "two rows at once, two sets"],
)
def test_fake_driver_passes_the_parity_suite(
    with_engine: WithEngine, gpu: FakeGpu, checkpoint_folder: Path, profiles: Any, settings: dict[str, Any]
) -> None:
    """Every case of `galerne verify`, against PyTorch: window edge, rows of different lengths, poisoned cache, free tokens."""
    gpu.replace(**settings)
    report = verify(with_engine("fp32", profiles), open_checkpoint(checkpoint_folder), engine=NAME)
    assert report.passed, [case for case in report.cases if not case.passed]
    assert {"rows of different lengths", "poisoned cache", "token by token", "greedy tokens"} <= {
        case.name for case in report.cases
    }


def test_fake_driver_takes_two_kinds_of_layers(gpu: FakeGpu, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_ministral(tmp_path / "checkpoint"))
    bundle = enter_engine(export(checkpoint, recipes.load("fp32"), tmp_path / "bundle", chunk=CHUNK))
    report = verify(bundle, checkpoint, engine=NAME)
    assert report.passed, [case for case in report.cases if not case.passed]


def test_fake_driver_pads_where_a_profile_has_one_size(with_engine: WithEngine, gpu: FakeGpu) -> None:
    """A chunk profile that takes 8 tokens and no fewer: prompts are padded, but not across the ring's end or when decoding."""
    static = {**prefill(CHUNK), "tokens": [CHUNK, CHUNK, CHUNK]}
    bundle = with_engine("fp32", [DECODE, static])
    for length in (1, 5, 8, 13, 21, 50):
        assert tokens(bundle, NAME, [IDS[:length]], 30) == tokens(bundle, "portable", [IDS[:length]], 30)
    gpu.replace()
    with Model.open(bundle.path, NAME) as model:
        session = model.session()
        session.append(IDS[:21])
        assert gpu.driver.counts["run"] == 3
        session.append(IDS[21:23])  # the ring of 24 has three slots left: no room for 8
        assert gpu.driver.counts["run"] == 5


@pytest.mark.parametrize("draft", [0, 4])
def test_fake_driver_speculates(with_engine: WithEngine, gpu: FakeGpu, draft: int) -> None:
    """With a profile for drafts, and without one, where a run of the prompt's profile checks them."""
    text = (IDS[:7] * 6)[:40]
    bundle = with_engine("fp32", chosen=Options(draft=draft))
    assert tokens(bundle, NAME, [text], 40, speculate=4) == tokens(bundle, "portable", [text], 40)


def test_fake_driver_sessions_rewind_fork_and_save(with_engine: WithEngine, gpu: FakeGpu, tmp_path: Path) -> None:
    """Sessions go from one engine to the other; the rings differ in size until they are full."""
    bundle = with_engine("fp32")
    with Model.open(bundle.path, "portable", exact=True) as portable, Model.open(bundle.path, NAME) as model:
        for length in (5, 37):
            expected, session = portable.session(), model.session()
            expected.append(IDS[:length])
            session.append(IDS[:length])
            expected.save(tmp_path / "portable")
            session.save(tmp_path / "fake")
            following = greedy(expected, 30)
            twin = session.fork()
            assert greedy(session, 30) == following
            assert greedy(twin, 30) == following
            assert greedy(model.load_session(tmp_path / "portable"), 30) == following
            assert greedy(portable.load_session(tmp_path / "fake"), 30) == following
            session.rewind(CHUNK)
            session.append(following[-CHUNK:])
            expected.rewind(CHUNK)
            expected.append(following[-CHUNK:])
            np.testing.assert_allclose(session.logits, expected.logits, rtol=0, atol=1e-5)


def test_fake_driver_shows_copies_of_the_rings(with_engine: WithEngine, gpu: FakeGpu) -> None:
    with Model.open(with_engine("fp16").path, NAME) as model:
        session = model.session()
        assert model.engine.dtype == np.float16
        session.append(IDS[:5])
        before = session.cache
        assert [array.shape for array in before] == [(1, 2, 24, 32)] * 4
        assert all(array[:, :, :5].any() and not array[:, :, 5:].any() for array in before)
        for array in before:
            array[...] = np.nan
        session.append(IDS[5:6])
        assert np.isfinite(session.logits).all() and np.isfinite(session.cache[0]).all()


def test_fake_driver_leaves_views_of_logits_valid(with_engine: WithEngine, gpu: FakeGpu) -> None:
    with Model.open(with_engine("fp32").path, NAME) as model:
        session = model.session()
        session.append(IDS[:20])
        view = session.logits
        address, first = view.ctypes.data, view.copy()
        session.append(IDS[20:21])
        assert session.logits.ctypes.data == address and not np.array_equal(view, first)
        last = view.copy()
    assert np.array_equal(view, last)
    assert gpu.driver.held == (0, 0, 0, 1)
    del view, session
    assert gpu.driver.held == (0, 0, 0, 0)


def test_fake_driver_serves_threads(with_engine: WithEngine, gpu: FakeGpu) -> None:
    with Model.open(with_engine("fp32").path, NAME) as model:

        def follow(seed: int) -> list[int]:
            session = model.session()
            session.append(IDS[seed : 4 + 9 * seed])
            return greedy(session, 40)

        alone = [follow(seed) for seed in range(1, 7)]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(follow, range(1, 7))) == alone


def test_fake_driver_decodes_without_a_graph_where_none_can_be_recorded(with_engine: WithEngine, gpu: FakeGpu) -> None:
    bundle = with_engine("fp32")
    expected = tokens(bundle, "portable", [IDS[:13]], 20)
    gpu.replace(capturable=False)
    assert tokens(bundle, NAME, [IDS[:13]], 20) == expected
    assert gpu.driver.counts["launch"] == 0
    gpu.replace()
    gpu.driver.fail_at = "cuStreamEndCapture"
    assert tokens(bundle, NAME, [IDS[:13]], 20) == expected
    assert gpu.driver.counts["launch"] == 0


def test_fake_driver_reads_an_engine_by_mapping_where_there_is_no_stream(with_engine: WithEngine, gpu: FakeGpu) -> None:
    bundle = with_engine("fp32")
    gpu.replace(streams=False)
    assert tokens(bundle, NAME, [IDS[:3]], 4) == tokens(bundle, "portable", [IDS[:3]], 4)


def test_fake_driver_refits_a_stripped_engine(with_engine: WithEngine, gpu: FakeGpu) -> None:
    bundle = with_engine("fp32", stripped=True)
    assert tokens(bundle, NAME, [IDS[:3]], 4) == tokens(bundle, "portable", [IDS[:3]], 4)
    assert gpu.trt.refitted == [str(bundle.path / "network.onnx")]  # beside weights.bin


def test_fake_driver_refuses_a_batch_that_no_profile_takes(with_engine: WithEngine, gpu: FakeGpu) -> None:
    bundle = with_engine("fp32", chosen=Options(batch=(2, 4, 4)))
    with Model.open(bundle.path, NAME) as model:
        with pytest.raises(InputError, match="no profile takes 1 sequences of 8 tokens .there are: B 2 to 4, S 1 to 2"):
            model.session().append(IDS[:8])
        assert np.isfinite(model.rows(2).feed([IDS[:8], IDS[:3]])).all()
