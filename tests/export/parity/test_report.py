"""The report's two forms."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from galerne.export.parity.report import AgainstSource, Report, html
from galerne.export.parity.tolerances import TABLE, arithmetic
from galerne.optimize.quantize import recipe
from galerne.runtime.measures import CaseResult

CASES = (
    CaseResult("prompt of 8", 8, 1.23456789e-5, 1e-13, 1.0, True),
    CaseResult("rows", 9, math.nan, math.nan, 0.5, False, ("max_abs nan is over <0.001>",)),
    CaseResult("greedy tokens", 264, None, None, 1.0, True),
)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def report() -> Report:
    """A report with a case of each kind."""
    limits = TABLE["float32"].limits(2.0)
    source = AgainstSource("prompt of 8", 0.5, 0.25, 0.75)
    return Report(False, "portable", "floats <b>", "transformers X", "float32", 2.0, limits, CASES, source)


def test_json(report: Report) -> None:
    tree = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert tree["passed"] is False
    assert tree["cases"][0]["max_abs"] == 1.235e-05
    assert tree["cases"][1]["max_abs"] is None and tree["cases"][1]["mean_kl"] is None
    assert tree["tolerances"]["max_abs"] == 0.001 and tree["tolerances"]["source"]
    assert report.to_json() == report.to_json()


def test_page_needs_nothing_else_and_escapes(report: Report) -> None:
    page = html(report)
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    assert "<b>" not in page and "floats &lt;b&gt;" in page
    assert "max_abs nan is over &lt;0.001&gt;" in page
    reader = _Text()
    reader.feed(page)
    assert {case.name for case in CASES} <= set(reader.text)


@pytest.mark.parametrize(
    ("name", "engine", "row"),
    [
        ("fp32", "portable", "float32"),
        ("fp16", "portable", "float16"),
        ("int4-rtn", "portable", "float16"),
        ("fp16", "cpu", "float32"),
        ("bf16", "cpu", "float32"),
        ("int8", "cpu", "int8 activations"),
        ("fp16", "rtx-4090", "float16"),
    ],
)
def test_row_of_the_table(name: str, engine: str, row: str) -> None:
    assert arithmetic(recipe.load(name), engine) == row


@pytest.mark.parametrize(("logits_std", "max_abs"), [(0.1, 5e-5), (1.0, 5e-4), (5.0, 1e-3)])
def test_float32_never_passes_a_thousandth(logits_std: float, max_abs: float) -> None:
    assert TABLE["float32"].limits(logits_std).max_abs == pytest.approx(max_abs)
