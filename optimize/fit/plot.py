"""Draws memory and speed over the context, for every recipe, as a picture that needs nothing to be shown."""

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from galerne.errors import InputError
from galerne.files import write_atomic
from galerne.optimize.fit.choice import Assessment, Case
from galerne.optimize.fit.fit import Fit
from galerne.optimize.quantize.recipe import load

_WIDTH, _HEIGHT, _TOP, _LEFT, _GAP, _RIGHT = 760, 270, 64, 84, 88, 128
_POINTS = 48
_SHORTEST, _LONGEST = 128, 131072
_COLORS = ("#4c4c4c", "#1f77b4", "#17a398", "#d9822b", "#b8336a", "#6a4fb3", "#7a8b2a")
_LINE_HEIGHT = 15


@dataclass(frozen=True)
class Line:
    """One recipe: its name and a value for each context."""

    name: str
    values: list[float]
    color: str


@dataclass(frozen=True)
class Panel:
    """One chart over the contexts.

    limit: a level to mark, with what it is called; None for none.
    """

    title: str
    unit: str
    lines: list[Line]
    limit: tuple[float, str] | None = None


def kind_of(path: Path) -> str:
    """Return "html" or "svg". Raises: InputError if the file's name ends otherwise."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("html", "svg"):
        raise InputError(f"--plot {path}: expected a name that ends in .html or .svg")
    return kind


def draw(result: Assessment, path: Path) -> None:
    """Write the picture of a case to a .html or .svg file. Raises: InputError if it cannot be written."""
    picture = svg(result)
    if kind_of(path) == "html":
        title = html.escape(f"{result.case.name} on {result.case.target.title}")
        picture = f'<!doctype html>\n<meta charset="utf-8">\n<title>{title}</title>\n<body>\n{picture}</body>\n'
    try:
        write_atomic(path, picture.encode())
    except OSError as exc:
        raise InputError(f"--plot {path}: cannot be written ({exc.strerror})") from exc


def contexts_of(case: Case) -> list[int]:
    """Return the contexts to draw: evenly on a logarithmic axis, up to the longest."""
    windows = [window for window in case.model.layer_windows if window is not None]
    last = case.max_context or max(8 * max(windows, default=0), 2 * case.context)
    last = max(2 * _SHORTEST, min(last, _LONGEST)) if case.max_context is None else min(last, _LONGEST)
    first = min(_SHORTEST, max(1, last // 2))
    steps = [first * (last / first) ** (i / (_POINTS - 1)) for i in range(_POINTS)]
    edges = [edge for window in windows for edge in (window, window + case.chunk) if first <= edge <= last]
    return sorted({*(round(step) for step in steps), *edges, last})


def svg(result: Assessment) -> str:
    """Return the picture as SVG."""
    case = result.case
    contexts = contexts_of(case)
    fits: dict[str, list[Fit]] = {}
    for name, each in result.recipes.items():
        if not each.missing_types:
            fits[name] = [case.fit(load(name), context=context) for context in contexts]
    colors = dict(zip(fits, itertools.cycle(_COLORS), strict=False))
    limit = result.chosen.limit_bytes
    what = "budget" if limit < result.chosen.usable_bytes else "usable memory"
    panels = [
        Panel(
            "Memory at its peak",
            "GB",
            [Line(name, [each.peak_bytes / 1e9 for each in row], colors[name]) for name, row in fits.items()],
            (limit / 1e9, f"{what} {limit / 1e9:.1f} GB"),
        ),
        Panel(
            "Decode, upper bound",
            "tok/s",
            [Line(name, [each.decode_bound_tokens_per_s for each in row], colors[name]) for name, row in fits.items()],
        ),
    ]
    windows = sorted({window for window in case.model.layer_windows if window is not None})
    height = _TOP + len(panels) * (_HEIGHT + _GAP)
    title = f"{case.name} on {case.target.title}, {case.stack.name}, batch {case.batch}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + _RIGHT} {height}" '
        f'width="{_LEFT + _WIDTH + _RIGHT}" height="{height}" font-family="sans-serif" font-size="13" fill="#222">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="28" font-size="17">{html.escape(title)}</text>',
    ]
    for i, panel in enumerate(panels):
        parts += _panel(panel, contexts, windows, _TOP + 20 + i * (_HEIGHT + _GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, contexts: Sequence[int], windows: Sequence[int], top: int) -> list[str]:
    highest = max(max(line.values) for line in panel.lines) if panel.lines else 1.0
    if panel.limit is not None:
        highest = max(highest, panel.limit[0])
    step = _step(highest)
    ceiling = math.ceil(highest * 1.04 / step) * step
    low = math.log(contexts[0])
    high = math.log(contexts[-1]) if len(contexts) > 1 else low + 1

    def x(context: float) -> float:
        return _LEFT + _WIDTH * (math.log(context) - low) / (high - low)

    def y(value: float) -> float:
        return top + _HEIGHT * (1 - value / ceiling)

    parts = [f'<text x="{_LEFT}" y="{top - 10}" font-weight="bold">{panel.title}, {panel.unit}</text>']
    for i in range(round(ceiling / step) + 1):
        level = y(i * step)
        parts.append(f'<path d="M{_LEFT} {level:.1f}h{_WIDTH}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    power = 2 ** math.ceil(math.log2(contexts[0]))
    while power <= contexts[-1]:
        parts.append(f'<path d="M{x(power):.1f} {top + _HEIGHT}v5" stroke="#888"/>')
        parts.append(f'<text x="{x(power):.1f}" y="{top + _HEIGHT + 20}" text-anchor="middle">{power}</text>')
        power *= 2
    parts.append(f'<text x="{_LEFT + _WIDTH / 2}" y="{top + _HEIGHT + 40}" text-anchor="middle">context, tokens</text>')
    for window in windows:
        if contexts[0] <= window <= contexts[-1]:
            parts.append(f'<path d="M{x(window):.1f} {top}v{_HEIGHT}" stroke="#777" stroke-dasharray="2 4"/>')
            parts.append(f'<text x="{x(window) + 5:.1f}" y="{top + 12}" fill="#555">window {window}</text>')
    if panel.limit is not None:
        level = y(panel.limit[0])
        parts.append(f'<path d="M{_LEFT} {level:.1f}h{_WIDTH}" stroke="#c00" stroke-width="2" stroke-dasharray="8 4"/>')
        parts.append(f'<text x="{_LEFT + 6}" y="{level - 6:.1f}" fill="#c00">{panel.limit[1]}</text>')
    for i, line in enumerate(panel.lines):
        dashes = ' stroke-dasharray="12 12"' if any(line.values == other.values for other in panel.lines[:i]) else ""
        points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in zip(contexts, line.values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line.color}" stroke-width="2"{dashes}/>')
    return parts + _labels(panel.lines, [y(line.values[-1]) for line in panel.lines])


def _labels(lines: Sequence[Line], levels: Sequence[float]) -> list[str]:
    """Name each line at its right end; where ends are close, one below the other."""
    parts, last = [], -math.inf
    for level, line in sorted(zip(levels, lines, strict=True), key=lambda pair: pair[0]):
        last = max(level, last + _LINE_HEIGHT)
        text = f"{line.name}, {line.values[-1]:.1f}"
        parts.append(f'<text x="{_LEFT + _WIDTH + 8}" y="{last + 4:.1f}" fill="{line.color}">{text}</text>')
    return parts


def _step(highest: float) -> float:
    """Return a round step that gives four to ten levels."""
    power = 10.0 ** math.floor(math.log10(highest / 4)) if highest > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10) if highest / (power * factor) <= 8)
