"""The shared random Mistral's bundles in the primitive dialect."""

from collections.abc import Callable
from pathlib import Path

import pytest

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle

CHUNK = 8


@pytest.fixture(scope="session")
def mistral(checkpoint_folder: Path) -> Checkpoint:
    """The shared random Mistral: 2 layers, window 16, 4/2 heads of 32."""
    return open_checkpoint(checkpoint_folder)


@pytest.fixture(scope="session")
def primitive_of(mistral: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Return the bundle of a recipe, made once, so tests must not change it."""
    made: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        if name not in made:
            out = tmp_path_factory.mktemp("primitive") / name
            made[name] = export(mistral, recipe.load(name), out, chunk=CHUNK, dialect="primitive")
        return made[name]

    return get
