"""The engine for ONNX Runtime's CUDA provider, on a GPU where there is one. Elsewhere the CPU provider runs its graph."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from galerne.errors import BackendError, InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.verify import verify
from galerne.export.prequantized import choose_recipe
from galerne.optimize.builders.build import build
from galerne.optimize.builders.tensorrt.options import Options
from galerne.optimize.quantize import recipe as recipes
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines import ort_device, select
from galerne.runtime.engines.ort import open_session
from galerne.runtime.engines.ort_cuda import open_cuda_provider, open_ort_cuda
from galerne.runtime.engines.ort_device import DeviceEngine
from galerne.runtime.generate import Generation
from galerne.runtime.model import Model
from galerne.targets import target
from tests.conftest import save_mistral

BundleOf = Callable[[str], Bundle]
IDS = np.random.default_rng(5).integers(0, 501, 200).tolist()
TARGET, STACK = "h200", "onnxruntime-cuda"


def built(bundle: Bundle, folder: Path) -> Bundle:
    copy = Bundle.open(Path(shutil.copytree(bundle.path, folder)))
    chosen = target.load(TARGET)
    return build(copy, chosen, stack=chosen.stack(STACK))


def opened(bundle: Bundle) -> tuple[Model, DeviceEngine]:
    model = Model.open(bundle.path, TARGET)
    assert isinstance(model.engine, DeviceEngine)
    return model, model.engine


def tokens_of(model: Model, count: int, speculate: int = 0) -> list[int]:
    return [
        token for _, token in Generation(model, [IDS[:100]], max_new_tokens=count, ignore_eos=True, speculate=speculate)
    ]


@pytest.mark.usefixtures("cuda_device")
@pytest.mark.parametrize(
    "recipe",
    [pytest.param("fp32", marks=pytest.mark.slow), "fp16", pytest.param("int8", marks=pytest.mark.slow), "int4-rtn"],
)
def test_the_parity_suite_passes(bundle_of: BundleOf, checkpoint_folder: Path, tmp_path: Path, recipe: str) -> None:
    """Window edge, ring wrapped, rows of different lengths, poisoned cache: the whole of `galerne verify`."""
    bundle = built(bundle_of(recipe), tmp_path / "bundle")
    report = verify(bundle, open_checkpoint(checkpoint_folder), engine=TARGET)
    assert report.passed, [case for case in report.cases if not case.passed]


@pytest.mark.usefixtures("cuda_device")
def test_rounded_rings(checkpoint_folder: Path, tmp_path: Path) -> None:
    from tests.export.quantized.cached import round_cache_of

    round_cache_of(checkpoint_folder, tmp_path / "checkpoint")
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    bundle = export(checkpoint, choose_recipe(checkpoint, None, None), tmp_path / "plain", chunk=8)
    made = built(bundle, tmp_path / "bundle")
    with Model.open(made.path, TARGET) as model:
        assert model.engine.ring_dtype == np.int8
    report = verify(made, checkpoint, engine=TARGET)
    assert report.passed, [case for case in report.cases if not case.passed]


@pytest.mark.usefixtures("cuda_device")
def test_a_ring_grows_by_halves_of_the_full_one(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_mistral(tmp_path / "checkpoint", sliding_window=990))
    plain = export(checkpoint, recipes.load("fp32"), tmp_path / "plain", chunk=10)
    with Model.open(plain.path, "portable", exact=True) as portable:
        expected = tokens_of(portable, 450)
    model, _ = opened(built(plain, tmp_path / "bundle"))
    with model:
        rows = model.rows()
        sizes = []
        for first in range(0, 600, 100):
            rows.feed([(IDS * 3)[first : first + 100]])
            sizes.append(rows.capacities)
        assert sizes == [(250,), (250,), (500,), (500,), (500,), (1000,)]
        assert tokens_of(model, 450) == expected
        assert tokens_of(model, 450, speculate=3) == expected


@pytest.mark.usefixtures("cuda_device")
def test_rings_and_recordings_go_to_the_next_session(bundle_of: BundleOf, tmp_path: Path) -> None:
    """Of which the first fills them with what is not a number, as an overflow would."""
    model, engine = opened(built(bundle_of("fp32"), tmp_path / "bundle"))
    with model:
        found, memory = [], set()
        for _ in range(4):
            session = model.session()
            for token in IDS[:30]:
                session.append([token])
            found.append(session.logits.copy())
            cache = session._rows.cache
            memory |= {value.data_ptr() for value in cache.rings.values}  # type: ignore[attr-defined]
            cache.fill([np.full_like(array, np.nan) for array in cache.arrays()])
            session.close()
        assert all(np.array_equal(each, found[0]) for each in found)
        assert len(memory) == 4
        both = [model.session() for _ in range(2)]
        for token in IDS[:30]:
            for each in both:
                each.append([token])
        assert all(np.array_equal(each.logits, found[0]) for each in both)
        assert engine.records


def test_what_cannot_be_recorded_is_run(bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime refuses to record where a node has no kernel on the GPU."""
    monkeypatch.setattr(select, "open_ort_cuda", functools.partial(open_ort_cuda, device="cpu"))

    def refusing(graph: Path, options: Any, providers: dict[str, dict[str, str]], weights: Path) -> object:
        if providers["CPUExecutionProvider"]:
            raise BackendError("as all compute graph nodes have not been partitioned")
        return open_session(graph, options, providers, weights)

    monkeypatch.setattr(ort_device, "open_session", refusing)
    monkeypatch.setitem(ort_device._RECORDING, "cpu", {"enable_cuda_graph": "1"})
    model, engine = opened(built(bundle_of("fp32"), tmp_path / "bundle"))
    with model, Model.open(bundle_of("fp32").path, "portable", exact=True) as portable:
        assert not engine.records
        assert tokens_of(model, 60) == tokens_of(portable, 60)


def test_the_engine_holds_no_weights_of_its_own(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = built(bundle_of("int4-rtn"), tmp_path / "bundle")
    names = {name: entry.size for name, entry in bundle.manifest.files.items() if name.startswith("engines/")}
    assert set(names) == {f"engines/{TARGET}/engine.onnx", f"engines/{TARGET}/engine.json"}
    assert sum(names.values()) < 100_000


def test_long_blocks(tmp_path: Path, cuda_device: str) -> None:
    """Which the provider's kernel for one token does not take: the engine's scales are repeated, the same weights."""
    own = tmp_path / "own.toml"
    own.write_text(
        'description = "blocks of 256"\ncompute = "float16"\nweights = { dtype = "int4", block_size = 256 }\n'
        'lm_head = { dtype = "int8" }\nembed_tokens = { dtype = "int8" }\n'
    )
    checkpoint = open_checkpoint(save_mistral(tmp_path / "checkpoint", hidden_size=256, intermediate_size=768))
    bundle = export(checkpoint, recipes.load(str(own)), tmp_path / "plain", chunk=8)
    with pytest.raises(BackendError, match="--engine cuda takes int4 in blocks of up to 128, this bundle's are of 256"):
        open_cuda_provider(bundle, exact=False, threads=None)
    made = built(bundle, tmp_path / "bundle")
    graph = onnx.load(str(made.file(f"engines/{TARGET}/engine.onnx")), load_external_data=False).graph
    blocks = [a.i for node in graph.node for a in node.attribute if a.name == "block_size"]
    assert (set(blocks), len(blocks)) == ({128}, 8)
    report = verify(made, checkpoint, engine=TARGET)
    assert report.passed, [case for case in report.cases if not case.passed]


def test_what_it_is_not_built_from(bundle_of: BundleOf, checkpoint_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found bfloat16, expected float32 or float16 or int8 or int4"):
        built(bundle_of("bf16"), tmp_path / "bf16")
    slots = export(
        open_checkpoint(checkpoint_folder), recipes.load("fp16"), tmp_path / "slots", chunk=8, adapter_slots=True
    )
    with pytest.raises(InputError, match="takes no adapter slots; export without --adapter-slots"):
        built(slots, tmp_path / "copy")
    chosen = target.load(TARGET)
    with pytest.raises(InputError, match="stack onnxruntime-cuda takes none of TensorRT's options"):
        build(bundle_of("fp16"), chosen, stack=chosen.stack(STACK), options=Options(draft=2))
