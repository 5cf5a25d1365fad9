"""The measures are those of PyTorch's own losses, and a model that says nothing useful fails."""

import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from galerne.export.quality.distance import Distance, distance
from galerne.export.quality.report import judge
from galerne.export.quality.thresholds import Thresholds


def random_logits(seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((7, 31)).astype(np.float32) * 3


def test_it_is_what_torch_computes() -> None:
    ids, source, bundle = np.arange(7) % 31, random_logits(0), random_logits(1)
    found = distance(ids, source, bundle)
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (source, bundle))
    kl = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    nexts = torch.from_numpy(ids[1:])
    assert found.kl == pytest.approx(kl.numpy(), rel=1e-9)
    assert found.nll == pytest.approx(functional.cross_entropy(q[:-1], nexts, reduction="none").numpy())
    assert found.source_nll == pytest.approx(functional.cross_entropy(p[:-1], nexts, reduction="none").numpy())
    assert found.agrees.tolist() == (source.argmax(1) == bundle.argmax(1)).tolist()
    measures = judge(Distance.join([found, found]), Thresholds())
    assert measures["perplexity"] == pytest.approx(functional.cross_entropy(q[:-1], nexts).exp().item())
    assert measures["mean_kl"] == pytest.approx(kl.mean().item())
    assert sum(measures["histogram"].counts) == 14
    assert measures["passed"]


@pytest.mark.parametrize(
    ("limits", "failure"),
    [
        (Thresholds(max_mean_kl=1e-3), "mean_kl .* is over 0.001"),
        (Thresholds(max_p99_kl=1e-3), "p99_kl .* is over 0.001"),
        (Thresholds(min_top1_agreement=0.999), "top1_agreement .* is under 0.999"),
        (Thresholds(max_perplexity_ratio=0.01), "perplexity over the source's .* is over 0.01"),
    ],
)
def test_each_limit_can_fail(limits: Thresholds, failure: str) -> None:
    measures = judge(distance(np.arange(7), random_logits(0), random_logits(1)), limits)
    assert not measures["passed"]
    (line,) = measures["failures"]
    assert re.match(failure, line)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_logits_that_are_not_finite_fail_without_any_limit() -> None:
    broken = random_logits(1)
    broken[3] = np.nan
    measures = judge(distance(np.arange(7), random_logits(0), broken), Thresholds())
    assert not measures["passed"]
    assert measures["failures"][0] == "the bundle's logits are not finite"
