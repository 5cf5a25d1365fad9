"""The page of a report: what it marks, and that it can be written of a bundle that gives no numbers at all."""

import math
from dataclasses import replace

import numpy as np
import pytest

from galerne.export.quality.distance import Distance
from galerne.export.quality.layers import LayerError
from galerne.export.quality.page import html
from galerne.export.quality.report import Beside, QualityReport, judge
from galerne.export.quality.thresholds import Thresholds


def report_of(kl: list[float]) -> QualityReport:
    """A report of positions with these KLs, whatever else it says."""
    values = np.array(kl)
    found = Distance(values, np.ones(len(kl), bool), np.full(len(kl) - 1, 3.0), np.full(len(kl) - 1, 3.1))
    return QualityReport(
        engine="portable",
        recipe="weights in int4",
        text="text.txt",
        tokens=len(kl),
        sequences=1,
        size_bytes=1_000_000,
        thresholds=Thresholds(),
        layers=(LayerError(0, 0.1, 0.1), LayerError(1, 0.05, 0.2)),
        **judge(found, Thresholds()),
    )


def test_the_histogram_shows_its_decades_alone_and_marks_mean_and_percentile() -> None:
    page = html(report_of([0.002] * 98 + [0.03, 0.05]))
    assert ">mean 0.00276</text>" in page and ">99th percentile 0.0302</text>" in page
    ticks = [f'text-anchor="middle">{tick}<' in page for tick in ("0.0001", "0.001", "0.01", "0.1", "10")]
    assert ticks == [False, True, True, True, False]
    assert "22.2, 1.1052 times the source's 20.09" in page.replace("&#x27;", "'")


def test_a_mark_beyond_the_histogram_is_left_out() -> None:
    assert "1e-09</text>" not in html(report_of([1e-9] * 100))


def test_logits_that_are_no_numbers_make_a_page() -> None:
    page = html(report_of([math.nan] * 20))
    assert "failed" in page and "the bundle's logits are not finite" in page.replace("&#x27;", "'")


@pytest.mark.parametrize(("length", "label"), [(60, "x" * 60), (61, "x" * 59 + "…")])
def test_a_long_description_is_cut_visibly(length: int, label: str) -> None:
    assert f">{label}<" in html(replace(report_of([0.1] * 9), recipe="int8"), [Beside("x" * length, 2_000_000, 0.01)])
