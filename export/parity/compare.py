"""Compares what two runners returned, case by case: Polygraphy's comparison, and two measures of the distributions."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from galerne.export.parity.cases import Case
from galerne.export.parity.report import CaseResult
from galerne.export.parity.tolerances import Tolerance

Floats = npt.NDArray[np.floating[Any]]


def compare_case(case: Case, results: RunResults, tolerance: Tolerance, atol: float) -> CaseResult:
    """Hold one case's outputs of the candidate against those of the reference.

    Args:
        results: of two runners with one iteration each, the reference first.
        tolerance: the limits on the distributions.
        atol: the limit on the difference between two logits, in the logits' own unit.
    """
    (_, (reference,)), (_, (candidate,)) = results
    tokens = sum(case.lengths) + case.greedy_tokens
    # Polygraphy passes over an output that only one side has, so the names are held against each other first.
    if set(reference) != set(case.outputs) or set(candidate) != set(case.outputs):
        found = f"outputs: expected {list(case.outputs)}, found {list(reference)} and {list(candidate)}"
        return CaseResult(case.name, tokens, None, None, 0.0, False, (found,))
    shapes = {name: (reference[name].shape, candidate[name].shape) for name in case.outputs}
    if wrong := [f"{name}: shape {other}, expected {shape}" for name, (shape, other) in shapes.items() if shape != other]:
        return CaseResult(case.name, tokens, None, None, 0.0, False, tuple(wrong))
    wanted = [reference[name] for name in case.outputs]
    got = [candidate[name] for name in case.outputs]
    if case.greedy_tokens:
        agreement, mean_kl = float((wanted[0] == got[0]).mean()), None
        failures = [] if _within(results, 0.0)[0] else [_first_difference(wanted[0], got[0])]
        return CaseResult(case.name, tokens, None, mean_kl, agreement, not failures, tuple(failures))
    within, max_abs = _within(results, atol)
    agreement, mean_kl = top1_agreement(np.concatenate(wanted), np.concatenate(got)), kl(np.concatenate(wanted), np.concatenate(got))
    failures = []
    if not within:
        failures.append(f"max_abs {max_abs:.3g} is over {atol:.3g}")
    if not mean_kl <= tolerance.max_mean_kl:  # and NaN is not
        failures.append(f"mean_kl {mean_kl:.3g} is over {tolerance.max_mean_kl:.3g}")
    positions = sum(map(len, wanted))
    if round((1 - agreement) * positions) > max(1, (1 - tolerance.min_top1_agreement) * positions):
        failures.append(f"top1_agreement {agreement:.3g} is under {tolerance.min_top1_agreement:.3g}")
    return CaseResult(case.name, tokens, max_abs, mean_kl, agreement, not failures, tuple(failures))


def kl(reference: Floats, candidate: Floats) -> float:
    """Return the mean over positions of KL(reference, candidate) in nats; logits [K, vocab_size] each."""
    total = 0.0
    for one, other in zip(reference, candidate, strict=True):
        p, q = _log_softmax(one), _log_softmax(other)
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(reference)


def top1_agreement(reference: Floats, candidate: Floats) -> float:
    """Return the share of positions with the same likeliest token; logits [K, vocab_size] each. NaN agrees with nothing."""
    same = (reference.argmax(axis=1) == candidate.argmax(axis=1)) & ~np.isnan(candidate).any(axis=1)
    return float(same.mean())


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # of infinite logits: NaN, which fails
        shifted = logits.astype(np.float64) - float(logits.max())
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _within(results: RunResults, atol: float) -> tuple[bool, float]:
    """Let Polygraphy compare by exact name and the largest difference. Returns: its verdict, and that difference."""
    compare = SimpleCompareFunc(
        check_error_stat="max", atol=atol, rtol=0.0, find_output_func=lambda name, *_: [name], check_shapes=True
    )
    # Its log goes to stdout. Infinite minus infinite is NaN, which fails.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(invalid="ignore", over="ignore"):
        accuracy = Comparator.compare_accuracy(results, compare_func=[compare])
    outputs = [output for (iteration,) in accuracy[0].values() for output in iteration.values()]
    return bool(accuracy), max((float(output.max_absdiff) for output in outputs), key=lambda x: math.inf if math.isnan(x) else x)


def _first_difference(wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> str:
    step = int(np.flatnonzero(wanted != got)[0])
    return f"generated token {step} is {got[step]}, the reference's is {wanted[step]}"
