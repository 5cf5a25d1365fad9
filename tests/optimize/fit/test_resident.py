"""The prediction for a CPU against the resident memory of a process that runs the bundle."""

from pathlib import Path

import pytest

from benchmarks.fit_memory import compare
from galerne.cli.demo import smollm2
from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.preset import preset_config
from galerne.export.synth import write_checkpoint
from galerne.optimize.builders.build import build
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.targets import target as targets

TINY = Path(__file__).parents[3] / "examples" / "tiny-mistral"
TOLERANCE = 0.05
ENGINES = ("cpu", "portable")


def with_engine(checkpoint: Path, out: Path, name: str) -> Bundle:
    return build(export(open_checkpoint(checkpoint), recipe.load(name), out), targets.load("cpu"))


@pytest.mark.parametrize("name", ["int4-rtn", "fp32"])
def test_tiny_mistral(name: str, tmp_path: Path) -> None:
    bundle = with_engine(TINY, tmp_path / "bundle", name)
    for engine in ENGINES:
        found = compare(bundle.path, engine, 1500)
        assert abs(found.error) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4-rtn", "int8", "fp16"])
def test_smollm2(name: str, tmp_path: Path) -> None:
    try:
        checkpoint = smollm2()
    except InputError as exc:
        pytest.skip(str(exc))
    bundle = with_engine(checkpoint, tmp_path / "bundle", name)
    for engine in ENGINES:
        for context in (256, 1500):
            found = compare(bundle.path, engine, context)
            assert abs(found.error) < TOLERANCE, found


@pytest.mark.slow
def test_the_model_of_the_benchmark(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    write_checkpoint(preset_config("benchmark-1b"), tmp_path / "checkpoint")
    bundle = with_engine(tmp_path / "checkpoint", tmp_path / "bundle", "int4-rtn")
    for engine in ENGINES:
        for context in (256, 2048):
            found = compare(bundle.path, engine, context)
            assert abs(found.error) < TOLERANCE, found
