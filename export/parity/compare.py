"""Compares what two runners returned, case by case: Polygraphy's comparison, and two measures of the distributions."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from galerne.export.parity.cases import Case
from galerne.export.parity.report import CaseResult
from galerne.export.parity.tolerances import Limits

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.floating[Any]]


def compare_case(case: Case, results: RunResults, limits: Limits) -> CaseResult:
    """Hold one case's outputs of the candidate against those of the reference.

    Args:
        results: of two runners with one iteration each, the reference first.
    """
    (_, (reference,)), (_, (candidate,)) = results
    tokens = sum(case.lengths) + case.greedy_tokens
    if wrong := _mismatch(case, reference, candidate):
        return CaseResult(case.name, tokens, None, None, 0.0, False, (wrong,))
    wanted = np.concatenate([reference[name] for name in case.outputs])
    got = np.concatenate([candidate[name] for name in case.outputs])
    if case.greedy_tokens:
        same, _ = _within(results, 0.0)
        differences = () if same else (_first_difference(wanted, got),)
        return CaseResult(case.name, tokens, None, None, float((wanted == got).mean()), same, differences)
    within, max_abs = _within(results, limits.max_abs)
    mean_kl, agreement = kl(wanted, got), top1_agreement(wanted, got)
    failures = []
    if not within:
        failures.append(f"max_abs {max_abs:.3g} is over {limits.max_abs:.3g}")
    if not mean_kl <= limits.max_mean_kl:  # as NaN is not
        failures.append(f"mean_kl {mean_kl:.3g} is over {limits.max_mean_kl:.3g}")
    if round((1 - agreement) * len(wanted)) > max(1, (1 - limits.min_top1_agreement) * len(wanted)):
        failures.append(f"top1_agreement {agreement:.3g} is under {limits.min_top1_agreement:.3g}")
    return CaseResult(case.name, tokens, max_abs, mean_kl, agreement, not failures, tuple(failures))


def _mismatch(case: Case, reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> str | None:
    """Say what is wrong with the outputs' names and shapes. Polygraphy itself passes over an output that one side lacks."""
    for outputs in (reference, candidate):
        if set(outputs) != set(case.outputs):
            return f"outputs: expected {', '.join(case.outputs)}, found {', '.join(outputs) or 'none'}"
    for name in case.outputs:
        if reference[name].shape != candidate[name].shape:
            return f"{name}: expected shape {list(reference[name].shape)}, found {list(candidate[name].shape)}"
    return None


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


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # of infinite logits: NaN, which fails
        shifted = logits.astype(np.float64) - float(logits.max())
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _within(results: RunResults, atol: float) -> tuple[bool, float]:
    """Let Polygraphy compare by exact name and the largest difference. Returns: its verdict, and that difference."""
    compare = SimpleCompareFunc(
        check_error_stat="max", atol=atol, rtol=0.0, find_output_func=lambda name, *_: [name], check_shapes=True
    )
    # Its log goes to stdout. Infinite minus infinite is NaN, which fails; relative differences, which may be infinite for
    # a token 0, are not what is asked for.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        accuracy = Comparator.compare_accuracy(results, compare_func=[compare])
    outputs = [output for (iteration,) in accuracy[0].values() for output in iteration.values()]
    return bool(accuracy), max(
        (float(output.max_absdiff) for output in outputs), key=lambda x: math.inf if math.isnan(x) else x
    )


def _first_difference(wanted: Array, got: Array) -> str:
    step = int(np.flatnonzero(wanted != got)[0])
    return f"generated token {step} is {got[step]}, the reference's is {wanted[step]}"
