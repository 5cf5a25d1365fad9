"""Sizes: against the files of real bundles, by hand for Mistral 7B, and where they may and may not grow."""

from collections.abc import Callable
from pathlib import Path

import pytest

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.facts import read_facts
from galerne.optimize.fit.fit import fit
from galerne.optimize.fit.memory import memory_of
from galerne.optimize.fit.workload import Workload
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import WEIGHTS, Bundle
from galerne.runtime.footprint import decode_weight_bytes, forms_of, stored_weight_bytes
from galerne.runtime.manifest import ModelFacts
from galerne.runtime.model import Model
from galerne.targets import target as targets

TINY = Path(__file__).parents[3] / "examples" / "tiny-mistral"
Bundles = Callable[[str], Bundle]


def work(model: ModelFacts, name: str, context: int, batch: int = 1, ring: int | None = None) -> Workload:
    return Workload(model, forms_of(recipe.load(name).resolved()), context, batch, 256, ring or context)


@pytest.mark.parametrize("name", [name for name in recipe.names() if not recipe.load(name).calibrated])
def test_weights_are_as_large_as_the_file(name: str, tmp_path: Path) -> None:
    bundle = export(open_checkpoint(TINY), recipe.load(name), tmp_path / "bundle")
    written = bundle.manifest.files[WEIGHTS].size
    predicted = stored_weight_bytes(bundle.manifest.model, forms_of(bundle.manifest.recipe))
    # Each of some fifty tensors starts on a page, which is what a file of a few megabytes has more.
    assert written - 60 * 4096 < predicted <= written


def test_tied_weights_are_counted_once(saved_mistral: Callable[..., Path], tmp_path: Path, bundle_of: Bundles) -> None:
    tied = export(open_checkpoint(saved_mistral(tie_word_embeddings=True)), recipe.load("fp16"), tmp_path / "bundle")
    apart = bundle_of("fp16")
    sizes = [stored_weight_bytes(each.manifest.model, forms_of(each.manifest.recipe)) for each in (tied, apart)]
    assert sizes[1] - sizes[0] == 501 * 128 * 2
    files = [each.manifest.files[WEIGHTS].size for each in (tied, apart)]
    assert abs((files[1] - files[0]) - (sizes[1] - sizes[0])) < 2 * 4096


def test_every_expert_is_counted(tmp_path: Path) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=501, sliding_window=16,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    bundle = export(open_checkpoint(tmp_path / "checkpoint"), recipe.load("fp32"), tmp_path / "bundle", chunk=8)
    facts = bundle.manifest.model
    assert facts.num_experts == 4
    written, predicted = (
        bundle.manifest.files[WEIGHTS].size,
        stored_weight_bytes(facts, forms_of(bundle.manifest.recipe)),
    )
    assert predicted == pytest.approx(written, rel=0.06)


def test_mistral_7b_by_hand(mistral: ModelFacts) -> None:
    # int4 in blocks of 128 with a float16 scale is 4.125 bits; int8 head with a scale for each of 32000 outputs.
    layer = 4096 * 6144 + 4096 * 4096 + 4096 * 28672 + 14336 * 4096
    expected = 32 * layer * 4.125 / 8 + 32000 * 4096 + 32000 * 2
    forms = forms_of(recipe.load("int4-rtn").resolved())
    assert decode_weight_bytes(mistral, forms) == expected
    target = targets.load("l4")
    memory = memory_of(work(mistral, "int4-rtn", 100_000), target, target.stack())
    # 32 layers of 4096 + 256 slots with 8 heads of 128, key and value, float16: however long the text.
    assert memory.parts["cache"] == 32 * 4352 * 2 * 8 * 128 * 2
    assert memory.parts["weights"] == expected + 32000 * (4096 + 2) + 65 * 4096 * 4
    assert memory.transient == {}  # TensorRT-RTX builds elsewhere


def test_cache_stops_growing_at_the_window_and_a_chunk(mistral: ModelFacts) -> None:
    def cache(context: int) -> int:
        return fit(mistral, recipe.load("int4-rtn"), l4, l4.stack(), context=context).memory_bytes["cache"]

    l4 = targets.load("l4")
    assert cache(2048) < cache(4096) < cache(4352) == cache(4353) == cache(1_000_000)
    assert cache(4096) == 2 * cache(2048)


def test_layers_of_two_kinds_have_rings_of_their_own() -> None:
    facts, _ = read_facts("gemma-3-270m")
    full = [window for window in facts.layer_windows if window is None]
    windows = [window for window in facts.layer_windows if window is not None]
    assert full and windows
    slots = work(facts, "fp16", 32768).full_slots()
    assert slots == len(full) * 32768 + sum(window + 256 for window in windows)


def test_rings_on_a_cpu_are_those_of_the_runtime(bundle_of: Bundles) -> None:
    bundle = bundle_of("fp32")
    manifest = bundle.manifest
    with Model.open(bundle.path, "portable") as model:
        for context in (1, 15, 24, 100):
            rows = model.rows()
            rows.feed([[1] * context])
            held = sum(array.nbytes for array in rows.cache.arrays())
            asked = Workload(manifest.model, forms_of(manifest.recipe), context, 1, manifest.graph.chunk, context)
            target = targets.load("cpu")
            # The runtime starts with more slots than a context this short needs, up to the ring's full size.
            full = manifest.graph.capacities[0] * 2 * 2 * 2 * 32 * 4
            assert memory_of(asked, target, target.stack()).parts["cache"] <= held <= full


@pytest.mark.parametrize("context", [100, 300, 1500, 5000])
def test_grown_rings_without_a_window_are_those_of_the_runtime(
    saved_mistral: Callable[..., Path], tmp_path: Path, context: int
) -> None:
    checkpoint = open_checkpoint(saved_mistral(sliding_window=None, max_position_embeddings=8192))
    bundle = export(checkpoint, recipe.load("fp32"), tmp_path / "bundle")
    manifest = bundle.manifest
    with Model.open(bundle.path, "portable") as model:
        rows = model.rows()
        rows.feed([[1] * context])
        asked = Workload(manifest.model, forms_of(manifest.recipe), context, 1, 256, 8192)
        assert asked.grown_slots() == sum(array.shape[2] for array in rows.cache.arrays()) // 2


def test_a_primitive_graph_holds_its_scores_and_its_rings_twice(mistral: ModelFacts) -> None:
    box = targets.load("jetson-orin-nx-16gb")
    parts = [
        memory_of(work(mistral, "int4-rtn", 4096), box, box.stack(name)).parts
        for name in ("jetpack-6.2", "jetpack-7.2")
    ]
    assert parts[0]["activations"] - parts[1]["activations"] == 2 * 256 * 32 * 4096 * 4
    assert parts[0]["cache"] == 2 * parts[1]["cache"]
    assert {**parts[0], "activations": 0, "cache": 0} == {**parts[1], "activations": 0, "cache": 0}


def test_a_builder_counts_where_it_runs_on_the_box(mistral: ModelFacts) -> None:
    box = targets.load("jetson-orin-nano-8gb")
    found = fit(mistral, recipe.load("int4-rtn"), box, box.stack(), context=4096)
    assert found.fits and not found.builds
    assert found.transient_bytes["building"] > found.usable_bytes > found.peak_bytes


def test_a_builder_before_10_13_holds_the_engine_once_more(mistral: ModelFacts) -> None:
    box = targets.load("jetson-orin-nx-16gb")
    old, new = (
        memory_of(work(mistral, "int4-rtn", 4096), box, box.stack(name)) for name in ("jetpack-6.2", "jetpack-7.2")
    )
    weights = old.parts["weights"]
    assert old.transient["building"] - new.transient["building"] == weights
    assert new.transient["building"] > 2 * weights
