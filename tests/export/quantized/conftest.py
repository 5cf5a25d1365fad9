"""Checkpoints with rounded inputs, and their bundles, made once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from galerne.runtime.bundle import Bundle
from tests.export.quantized.cached import Scales, round_cache_of
from tests.export.quantized.compressed import quantize_checkpoint

# By a short name: the groups, and what else the checkpoint is made with.
ROUNDED: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "int8": ({"Linear": "int8"}, {}),
    "float8": ({"Linear": "float8"}, {}),
    "int8, k_proj wider": ({"Linear": "int8"}, {"wider_input": "k_proj"}),
    "int8 dynamic": ({"Linear": "int8 dynamic"}, {}),
    "int8 asymmetric": ({"Linear": "int8 asymmetric"}, {}),
    "mixed": ({"re:.*self_attn.*": "int8", "Linear": "int4", "lm_head": "int8"}, {"ignore": "none"}),
}


@dataclass
class Rounded:
    """A checkpoint, its bundle, and what compressed-tensors computes with it: logits [B, S, V] for ids [B, S]."""

    folder: Path
    bundle: Bundle
    logits: Callable[[Tensor], Tensor]


@pytest.fixture(scope="session")
def rounded(
    checkpoint_folder: Path, exported: Callable[[Path, Path], Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Rounded]:
    """Return a checkpoint of `ROUNDED` by its name; tests must not change it."""
    made: dict[str, Rounded] = {}

    def get(name: str) -> Rounded:
        if name not in made:
            folder = tmp_path_factory.mktemp("rounded")
            groups, settings = ROUNDED[name]
            logits = quantize_checkpoint(checkpoint_folder, folder / "checkpoint", groups, **settings)
            made[name] = Rounded(folder / "checkpoint", exported(folder / "checkpoint", folder / "bundle"), logits)
        return made[name]

    return get


@dataclass
class Cached:
    """A checkpoint of floats with scales of its keys and values, and its bundle."""

    folder: Path
    bundle: Bundle
    scales: Scales


@pytest.fixture(scope="session")
def cached(
    checkpoint_folder: Path, exported: Callable[[Path, Path], Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Cached:
    """A random Mistral whose keys and values are rounded; tests must not change it."""
    folder = tmp_path_factory.mktemp("cached")
    scales = round_cache_of(checkpoint_folder, folder / "checkpoint")
    return Cached(folder / "checkpoint", exported(folder / "checkpoint", folder / "bundle"), scales)
