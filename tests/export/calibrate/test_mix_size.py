"""A mix that GPTQ rounds is as large as it was counted, also where the embedding table is the vocabulary projection."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from galerne.export.calibrate.quantize import quantize
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.facts import read_facts
from galerne.export.prequantized import choose_recipe
from galerne.export.sensitivity.choose import mixed
from galerne.export.sensitivity.groups import groups_of, head_bytes, other_bytes
from galerne.export.sensitivity.mixes import Mix, Option
from galerne.optimize.quantize.recipe import Calibration, WeightFormat, load
from galerne.runtime.bundle import WEIGHTS

TEXT = Path(__file__).parents[3] / "examples" / "tiny-mistral" / "held-out.txt"
INT8, INT4 = WeightFormat("int8"), WeightFormat("int4", 32)


@pytest.mark.parametrize("narrow", [1, 0], ids=["most in int8", "all in int8"])
def test_a_tied_model(family_of: Callable[[str], Path], tmp_path: Path, narrow: int) -> None:
    source = open_checkpoint(family_of("llama"))
    facts, _ = read_facts(str(source.path))
    assert facts.tie_word_embeddings
    base = replace(load("int4-gptq"), calibration=Calibration(256, 32))
    groups = groups_of(facts)
    formats = [INT4] * narrow + [INT8] * (len(groups) - narrow)
    sizes = [
        head_bytes(facts, group, form, base.table) if group.layer is None else group.stored_bytes(form)
        for group, form in zip(groups, formats, strict=True)
    ]
    mix = Mix(tuple(Option(form, size, 0.0) for form, size in zip(formats, sizes, strict=True)))
    recipe = mixed(base, groups, mix, tied=True)
    assert recipe.weights == INT8
    folder = quantize(source, recipe, "mine", TEXT, tmp_path / "folder")
    checkpoint = open_checkpoint(folder)
    bundle = export(checkpoint, choose_recipe(checkpoint, None, None), tmp_path / "bundle", chunk=8)
    assert bundle.manifest.files[WEIGHTS].size <= mix.bytes + other_bytes(facts, source, base.table)
