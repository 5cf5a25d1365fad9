"""What a parity run found, as records and as JSON."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from galerne.export.parity.tolerances import Tolerance


@dataclass(frozen=True)
class CaseResult:
    """One case's measures over all its compared positions.

    tokens: how many were fed and generated.
    max_abs: the largest difference between two logits; None where there was nothing to compare.
    mean_kl: KL(reference, bundle) in nats; None where tokens were compared and not logits.
    top1_agreement: the share of positions with the same likeliest token, or of generated tokens that are the same.
    failures: what went over a limit, a line each.
    """

    name: str
    tokens: int
    max_abs: float | None
    mean_kl: float | None
    top1_agreement: float
    passed: bool
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class AgainstSource:
    """The bundle against the checkpoint as it is, unrounded: what the recipe costs, on random tokens. No criterion."""

    case: str
    max_abs: float
    mean_kl: float
    top1_agreement: float


@dataclass(frozen=True)
class Report:
    """A verdict, and everything that it rests on.

    engine: "portable" or the engine's name.
    recipe: the bundle's recipe in its own words.
    reference: what the bundle was compared with.
    arithmetic: the row of the tolerance table that holds.
    logits_std: the standard deviation of the reference's logits.
    max_abs: the limit on the difference between two logits that follows from both.
    """

    passed: bool
    engine: str
    recipe: str
    reference: str
    arithmetic: str
    tolerances: Tolerance
    logits_std: float
    max_abs: float
    cases: tuple[CaseResult, ...]
    against_source: AgainstSource

    def to_json(self) -> bytes:
        """Return the report as UTF-8 JSON without times or paths; four digits a number, and null for NaN."""
        return (json.dumps(_plain(dataclasses.asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
