"""Compares what two runners returned, case by case, with Polygraphy's comparison and the runtime's measures."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from galerne.export.parity.cases import Case
from galerne.runtime.measures import CaseResult, Limits, judge

Array = npt.NDArray[Any]


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
    _, max_abs = _within(results, limits.max_abs)
    return judge(case.name, tokens, wanted, got, max_abs, limits)


def _mismatch(case: Case, reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> str | None:
    """Say what is wrong with the outputs' names and shapes. Polygraphy itself passes over an output that one side lacks."""
    for outputs in (reference, candidate):
        if set(outputs) != set(case.outputs):
            return f"outputs: expected {', '.join(case.outputs)}, found {', '.join(outputs) or 'none'}"
    for name in case.outputs:
        if reference[name].shape != candidate[name].shape:
            return f"{name}: expected shape {list(reference[name].shape)}, found {list(candidate[name].shape)}"
    return None


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
