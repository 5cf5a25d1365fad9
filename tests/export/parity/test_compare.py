"""The comparison itself, by faults planted into what a runner returned: each must turn a case red under every row."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from polygraphy.comparator import IterationResult, RunResults

from galerne.export.parity.cases import Case
from galerne.export.parity.compare import compare_case
from galerne.export.parity.tolerances import TABLE, Arithmetic
from galerne.runtime.measures import CaseResult, kl, top1_agreement

Logits = npt.NDArray[np.float32]
Outputs = Mapping[str, npt.NDArray[Any]]

CASE = Case("rows", ((7, 5),))
NAME = CASE.outputs[0]


def _logits() -> Logits:
    return np.random.default_rng(0).standard_normal((12, 50)).astype(np.float32)


def _compare(row: Arithmetic, reference: Outputs, candidate: Outputs, case: Case = CASE) -> CaseResult:
    results = RunResults()
    for name, outputs in (("reference", reference), ("candidate", candidate)):
        results.append((name, [IterationResult(outputs, runner_name=name)]))
    return compare_case(case, results, TABLE[row].limits(1.0))


def _with_nan(logits: Logits) -> Logits:
    logits[3, 4] = np.nan
    return logits


def _with_infinity(logits: Logits) -> Logits:
    logits[3, 4] = np.inf
    return logits


def _one_row_wrong(logits: Logits) -> Logits:
    logits[11] = -logits[11]
    return logits


FAULTS: dict[str, Callable[[Logits], Logits]] = {
    "shifted by a position": lambda logits: np.roll(logits, 1, axis=0),
    "shifted by a token": lambda logits: np.roll(logits, 1, axis=1),
    "truncated": lambda logits: logits[:-1],
    "vocabulary truncated": lambda logits: logits[:, :-1],
    "rows swapped": lambda logits: np.concatenate([logits[7:], logits[:7]]),
    "one row wrong": _one_row_wrong,
    "NaN": _with_nan,
    "infinite": _with_infinity,
    "all zero": lambda logits: np.zeros_like(logits),
}


@pytest.mark.parametrize("row", list(TABLE))
@pytest.mark.parametrize("fault", list(FAULTS))
def test_planted_faults(row: Arithmetic, fault: str) -> None:
    result = _compare(row, {NAME: _logits()}, {NAME: FAULTS[fault](_logits())})
    assert not result.passed and result.failures


@pytest.mark.parametrize("row", list(TABLE))
def test_equal_logits_pass(row: Arithmetic) -> None:
    result = _compare(row, {NAME: _logits()}, {NAME: _logits()})
    assert result == CaseResult("rows", 12, 0.0, 0.0, 1.0, True)


@pytest.mark.parametrize("row", list(TABLE))
def test_nan_on_both_sides_fails(row: Arithmetic) -> None:
    assert not _compare(row, {NAME: _with_nan(_logits())}, {NAME: _with_nan(_logits())}).passed


def test_each_limit_holds_by_itself() -> None:
    far = _logits()
    far[0, far[0].argmin()] -= 0.1  # an unlikely token: one logit is off, the distribution is not
    assert [failure.split()[0] for failure in _compare("float16", {NAME: _logits()}, {NAME: far}).failures] == [
        "max_abs"
    ]
    noise = np.random.default_rng(1).uniform(-0.05, 0.05, (12, 50)).astype(np.float32)
    noisy = _compare("float16", {NAME: _logits()}, {NAME: _logits() + noise})
    assert [failure.split()[0] for failure in noisy.failures] == ["mean_kl"]


@pytest.mark.parametrize(
    ("candidate", "found"),
    [({}, "none"), ({"logits": _logits()}, "logits"), ({NAME: _logits(), "more": _logits()}, f"{NAME}, more")],
)
def test_output_names_are_checked(candidate: dict[str, Logits], found: str) -> None:
    for pair in (({NAME: _logits()}, candidate), (candidate, {NAME: _logits()})):
        result = _compare("float32", *pair)
        assert not result.passed
        assert result.failures == (f"outputs: expected {NAME}, found {found}",)


def test_second_ring_missing() -> None:
    case = Case("rings", ((12,),), rings=("growing", "full"))
    both = dict.fromkeys(case.outputs, _logits())
    assert _compare("float32", both, both, case).passed
    assert not _compare("float32", both, {case.outputs[0]: _logits()}, case).passed
    assert not _compare("float32", both, {**both, case.outputs[1]: -_logits()}, case).passed


def test_greedy_tokens_must_be_identical() -> None:
    case = Case("greedy tokens", ((4,),), greedy_tokens=6)
    wanted = np.arange(6)
    assert _compare("float32", {"tokens": wanted}, {"tokens": wanted.copy()}, case).passed
    got = np.where(wanted == 4, 9, wanted)
    result = _compare("float32", {"tokens": wanted}, {"tokens": got}, case)
    assert result.failures == ("generated token 4 is 9, the reference's is 4",)
    assert result.top1_agreement == pytest.approx(5 / 6)
    assert not _compare("float32", {"tokens": wanted}, {"tokens": wanted[:-1]}, case).passed
    assert not _compare("float32", {"tokens": wanted + 1}, {"tokens": wanted}, case).passed


def test_measures_against_hand_made_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    assert kl(np.log(p) + 3, np.log(q)) == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(0.5))
    assert top1_agreement(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.0, 2.0], [0.0, 1.0]])) == 0.5
    assert top1_agreement(np.array([[0.0, 1.0]]), np.array([[0.0, np.nan]])) == 0.0
