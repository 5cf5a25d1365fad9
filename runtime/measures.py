"""How far a model's logits are from a reference's: the measures, their limits, and the verdict on a case."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Limits:
    """What the logits of every case must keep to.

    max_abs: the largest difference between two logits.
    max_mean_kl: the mean over positions of KL(reference, bundle) in nats.
    min_top1_agreement: the share of positions whose likeliest token is the same. One position a case may always differ,
        since two tokens can be as good as equal.
    greedy: whether each token of free generation must be the one that the reference holds likeliest after those before it; one
        whose logit is within max_abs of the likeliest's will do.
    source: where the numbers come from.
    """

    max_abs: float
    max_mean_kl: float
    min_top1_agreement: float
    greedy: bool
    source: str


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


def judge(name: str, tokens: int, reference: Floats, candidate: Floats, max_abs: float, limits: Limits) -> CaseResult:
    """Hold the logits of one case against the reference's.

    Args:
        tokens: how many were fed.
        reference, candidate: [K, vocab_size].
        max_abs: their largest difference, as `largest_difference` or Polygraphy found it.
    """
    mean_kl, agreement = kl(reference, candidate), top1_agreement(reference, candidate)
    failures = []
    if not max_abs <= limits.max_abs:  # as NaN is not
        failures.append(f"max_abs {max_abs:.3g} is over {limits.max_abs:.3g}")
    if not mean_kl <= limits.max_mean_kl:
        failures.append(f"mean_kl {mean_kl:.3g} is over {limits.max_mean_kl:.3g}")
    count = len(reference)
    if round((1 - agreement) * count) > max(1, (1 - limits.min_top1_agreement) * count):
        failures.append(f"top1_agreement {agreement:.3g} is under {limits.min_top1_agreement:.3g}")
    return CaseResult(name, tokens, max_abs, mean_kl, agreement, not failures, tuple(failures))


def largest_difference(reference: Floats, candidate: Floats) -> float:
    """Return the largest difference between two logits [K, vocab_size]; NaN where one is no number, or both are infinite."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(reference.astype(np.float64) - candidate)
    return math.nan if np.isnan(difference).any() else float(difference.max())


def kl(reference: Floats, candidate: Floats) -> float:
    """Return the mean over positions of KL(reference, candidate) in nats; logits [K, vocab_size] each."""
    total = 0.0
    for one, other in zip(reference, candidate, strict=True):
        p, q = log_softmax(one), log_softmax(other)
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(reference)


def top1_agreement(reference: Floats, candidate: Floats) -> float:
    """Return the share of positions with the same likeliest token; logits [K, vocab_size] each. NaN agrees with nothing."""
    same = (reference.argmax(axis=1) == candidate.argmax(axis=1)) & ~np.isnan(candidate).any(axis=1)
    return float(same.mean())


def plain(value: Any, digits: int = 4) -> Any:
    """Return a report's records as tables, lists and values for JSON: so many digits a number, and None for NaN."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value), digits)
    if isinstance(value, dict):
        return {key: plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Return the logarithms of the probabilities of logits [vocab_size], float64."""
    with np.errstate(invalid="ignore"):  # of infinite logits: NaN, which fails
        shifted = logits.astype(np.float64) - float(logits.max())
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
