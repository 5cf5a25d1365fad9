"""Bundles of a faulty exporter must be told apart: each claims the right source and recipe, and computes something else."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

import galerne.export.export
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.safetensors_folder import SafetensorsCheckpoint
from galerne.export.export import export
from galerne.export.families.registry import read_spec
from galerne.export.parity import cases
from galerne.export.parity.verify import verify
from galerne.export.reader import ConfigReader
from galerne.export.rotary import read_rotary
from galerne.export.spec import DecoderSpec
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle

WINDOW, CHUNK = 16, 8
PRECISIONS = ["fp32", pytest.param("fp16", marks=pytest.mark.slow), "int4-rtn"]

FaultySpec = Callable[..., None]


class SwappedKeysAndValues(SafetensorsCheckpoint):
    """A checkpoint that gives keys for values and values for keys."""

    def read(self, name: str) -> NDArray[Any]:
        """Return the other tensor."""
        other = {".k_proj.": ".v_proj.", ".v_proj.": ".k_proj."}
        for part, wrong in other.items():
            if part in name:
                return super().read(name.replace(part, wrong))
        return super().read(name)


@pytest.fixture
def faulty_spec(monkeypatch: pytest.MonkeyPatch) -> FaultySpec:
    """Make the exporter misread a config."""

    def plant(**changes: Any) -> None:
        def misread(config: dict[str, Any], where: str) -> DecoderSpec:
            return dataclasses.replace(read_spec(config, where), **changes)

        monkeypatch.setattr(galerne.export.export, "read_spec", misread)

    return plant


def _failed(bundle: Bundle, checkpoint: Checkpoint) -> set[str]:
    report = verify(bundle, checkpoint)
    failed = {case.name for case in report.cases if not case.passed}
    assert report.passed == (not failed)
    return failed


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1, None])
def test_wrong_window(
    mistral: Checkpoint, tmp_path: Path, faulty_spec: FaultySpec, name: str, window: int | None
) -> None:
    faulty_spec(layer_windows=(window,) * 2)
    failed = _failed(export(mistral, recipe.load(name), tmp_path / "bundle", chunk=CHUNK), mistral)
    # Prompts inside of both windows cannot tell, which is how this fault ships.
    assert "prompt of 15" not in failed
    assert {"prompt of 17", "prompt of 32", "prompt of 67", "uneven chunks", "token by token"} <= failed


@pytest.mark.parametrize("window", [WINDOW, WINDOW - 1, WINDOW + 1, None])
def test_few_tokens_of_a_large_model_show_a_wrong_window(
    mistral: Checkpoint, tmp_path: Path, faulty_spec: FaultySpec, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    monkeypatch.setattr(cases, "_MOST_WORK", 0)
    faulty_spec(layer_windows=(window,) * 2)
    failed = _failed(export(mistral, recipe.load("int4-rtn"), tmp_path / "bundle", chunk=CHUNK), mistral)
    if window == WINDOW:
        assert not failed
    else:
        assert {"step by step across window and ring", "chunks across window and ring"} <= failed


@pytest.mark.parametrize("name", PRECISIONS)
def test_wrong_rope_theta(mistral: Checkpoint, tmp_path: Path, faulty_spec: FaultySpec, name: str) -> None:
    faulty_spec(layer_rotary=(read_rotary(ConfigReader({"rope_theta": 1e6}, "faulty"), head_dim=32),) * 2)
    failed = _failed(export(mistral, recipe.load(name), tmp_path / "bundle", chunk=CHUNK), mistral)
    assert {"prompt of 15", "prompt of 67", "rows of different lengths", "token by token"} <= failed


@pytest.mark.parametrize("name", PRECISIONS)
def test_keys_and_values_swapped(mistral: Checkpoint, tmp_path: Path, name: str) -> None:
    swapped = SwappedKeysAndValues(mistral.path)
    failed = _failed(export(swapped, recipe.load(name), tmp_path / "bundle", chunk=CHUNK), mistral)
    assert {"prompt of 15", "prompt of 67", "rows of different lengths", "token by token"} <= failed
