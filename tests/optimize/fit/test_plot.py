"""The picture: well-formed, self-contained, with the limit and the window's edge where they belong."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from galerne.errors import InputError
from galerne.optimize.fit.choice import Case, assess
from galerne.optimize.fit.plot import contexts_of, draw, svg

CaseOf = Callable[..., Case]
SVG = "{http://www.w3.org/2000/svg}"


def test_lines_limit_and_window(case_of: CaseOf) -> None:
    found = assess(case_of("mistral-7b-v0.1", "jetson-orin-nx-16gb"))
    root = ET.fromstring(svg(found))
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    lines = list(root.iter(f"{SVG}polyline"))
    drawn = [each.fits for each in found.recipes.values() if not each.missing_types]
    assert len(lines) == 2 * len(drawn) < 2 * len(found.recipes)  # bf16 is no type of this stack
    assert "usable memory 14.8 GB" in texts and texts.count("window 4096") == 2
    assert [text for text in texts if text.startswith("bf16")] == []
    # What does not fit is above the limit's line, and what fits below it; y grows downwards.
    limit = next(e for e in root.iter(f"{SVG}path") if e.get("stroke") == "#c00").get("d")
    level = float(re.findall(r"[\d.]+", limit or "")[1])
    ends = [float((line.get("points") or "").split()[-1].split(",")[1]) for line in lines[: len(drawn)]]
    assert [end > level for end in ends] == drawn


def test_memory_is_flat_past_the_window(case_of: CaseOf) -> None:
    case = case_of("mistral-7b-v0.1", "l4")
    contexts = contexts_of(case)
    assert contexts == sorted(set(contexts)) and {4096, 4352} <= set(contexts)
    line = next(ET.fromstring(svg(assess(case))).iter(f"{SVG}polyline"))
    heights = [float(point.split(",")[1]) for point in (line.get("points") or "").split()]
    edge = contexts.index(4352)
    assert len(heights) == len(contexts)
    assert heights[0] > heights[edge] == heights[-1]


def test_without_a_window_it_ends_at_the_longest_context(case_of: CaseOf) -> None:
    case = case_of("mistral-7b-v0.3", "l4", budget_bytes=10**10)
    assert contexts_of(case)[-1] == 32768
    picture = svg(assess(case))
    assert "budget 10.0 GB" in picture and "window" not in picture


@pytest.mark.parametrize(("longest", "context"), [(1, 1), (2, 1), (200, 100)])
def test_short_contexts_have_a_picture(case_of: CaseOf, longest: int, context: int) -> None:
    import dataclasses

    case = dataclasses.replace(case_of("mistral-7b-v0.3", "l4"), max_context=longest, context=context)
    ET.fromstring(svg(assess(case)))


def test_html_needs_nothing_else_and_names_are_escaped(case_of: CaseOf, tmp_path: Path) -> None:
    import dataclasses

    case = dataclasses.replace(case_of("mistral-7b-v0.1", "l4"), name="<script>&")
    draw(assess(case), tmp_path / "fit.html")
    page = (tmp_path / "fit.html").read_text()
    assert "<script" not in page and "&lt;script&gt;&amp;" in page
    assert re.findall(r"(?:src|href)=|url\(", page) == []


def test_a_name_of_another_kind_is_refused(case_of: CaseOf, tmp_path: Path) -> None:
    found = assess(case_of("mistral-7b-v0.1", "l4"))
    with pytest.raises(InputError, match="expected a name that ends in .html or .svg"):
        draw(found, tmp_path / "fit.png")
    with pytest.raises(InputError, match="cannot be written"):
        draw(found, tmp_path / "none" / "fit.svg")
