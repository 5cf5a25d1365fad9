"""A Mistral 7B and what it may be held against."""

from collections.abc import Callable
from pathlib import Path

import pytest

from galerne.export.facts import read_facts
from galerne.optimize.fit.choice import Case
from galerne.runtime.manifest import ModelFacts
from galerne.targets import target as targets

ROOT = Path(__file__).parents[3]
CaseOf = Callable[..., Case]


@pytest.fixture(scope="session")
def mistral() -> ModelFacts:
    """Mistral 7B v0.1, with its window of 4096."""
    return read_facts("mistral-7b-v0.1")[0]


@pytest.fixture
def case_of() -> CaseOf:
    """Return a function that makes a case of a preset and a target."""

    def make(model: str, name: str, context: int = 4096, batch: int = 1, **changes: object) -> Case:
        facts, longest = read_facts(model)
        target = targets.load(name)
        return Case(model, facts, target, target.stack(), context, batch, 256, longest, **changes)  # type: ignore[arg-type]

    return make
