"""The example model's bundles, which have a tokenizer and say something of real text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle

TINY = Path(__file__).parents[3] / "examples" / "tiny-mistral"


@pytest.fixture(scope="session")
def tiny_bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Return the example's bundle of a recipe; made once, so tests must not change it."""
    made: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        if name not in made:
            made[name] = export(open_checkpoint(TINY), recipe.load(name), tmp_path_factory.mktemp("tiny") / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundle_of: Callable[[str], Bundle]) -> Bundle:
    """The example's int4 bundle."""
    return tiny_bundle_of("int4-rtn")
