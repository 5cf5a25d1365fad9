"""A report of quality as a page: error by layer, the distribution of KL, and size against KL over recipes."""

import math
from collections.abc import Sequence
from html import escape

from galerne.export.page import page
from galerne.export.quality.report import Beside, QualityReport

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM = 720, 220, 56, 24, 28
_ROOM = _WIDTH - _LEFT - _RIGHT
_LABEL = 60  # characters of a recipe's description
_HALO = 'paint-order="stroke" stroke="#fff" stroke-width="3"'  # so that a label can be read over a bar
_BLUE, _ORANGE, _GRID = "#2f6db5", "#d1762c", "#d9dee6"


def html(report: QualityReport, beside: Sequence[Beside] = ()) -> str:
    """Return a report as one page.

    Args:
        beside: reports of other bundles of the same source on the same text, for the plot of size against KL.
    """
    limits = {name: value for name, value in vars(report.thresholds).items() if value is not None}
    ratio = report.perplexity / report.source_perplexity
    facts = {
        "Engine": report.engine,
        "Recipe": report.recipe,
        "Text": f"{report.text}, {report.tokens} tokens in {report.sequences} sequences",
        "Perplexity": f"{report.perplexity:.4g}, {ratio:.4f} times the source's {report.source_perplexity:.4g}",
        "KL, nats": f"mean {report.mean_kl:.3g}, 99th percentile {report.p99_kl:.3g}",
        "Top-1 agreement": f"{report.top1_agreement:.2%}",
        "Size": f"{report.size_bytes / 1e6:.1f} MB",
        "Limits": ", ".join(f"{name} {value:g}" for name, value in limits.items()) or "none",
    }
    parts = [f'<p class="why">{escape(line)}</p>' for line in report.failures]
    parts += [
        "<h2>Relative error of each layer's output</h2>",
        _key((_BLUE, "what the layer's own weights add"), (_ORANGE, "with what all layers before it made of theirs")),
        _layers(report),
        "<h2>Positions by KL(source, bundle) in nats</h2>",
        _histogram(report),
    ]
    points = [Beside(report.recipe, report.size_bytes, report.mean_kl), *beside]
    if len(points) > 1:
        parts += [
            "<h2>Mean KL in nats by size in MB</h2>",
            _key((_ORANGE, "this bundle"), (_BLUE, "others")),
            _sizes(points),
        ]
    return page("Quality", report.passed, facts, "\n".join(parts))


def _key(*colours: tuple[str, str]) -> str:
    """Return what the colours of a plot stand for."""
    return "<p>" + " &nbsp; ".join(f'<b style="color: {colour}">■</b> {text}' for colour, text in colours) + "</p>"


def _layers(report: QualityReport) -> str:
    top = max(max(layer.total, layer.added) for layer in report.layers) or 1.0
    step = _ROOM / len(report.layers)
    marks = []
    for layer in report.layers:
        x = _LEFT + layer.layer * step
        marks.append(_bar(x, step * 0.4, layer.added / top, _BLUE))
        marks.append(_bar(x + step * 0.4, step * 0.4, layer.total / top, _ORANGE))
    every = math.ceil(len(report.layers) / 16)
    ticks = [(_LEFT + (i + 0.4) * step, str(i)) for i in range(0, len(report.layers), every)]
    return _plot(marks, ticks, [(share, f"{share * top:.2g}") for share in (0, 0.5, 1)])


def _histogram(report: QualityReport) -> str:
    edges, counts = report.histogram.edges, report.histogram.counts
    # Without the empty ends, from decade to decade: a decade's edge has a whole logarithm.
    decades = [i for i, edge in enumerate(edges) if abs(math.log10(edge) - round(math.log10(edge))) < 1e-6]
    filled = [i for i, count in enumerate(counts) if count] or [0]
    first = max(i for i in decades if i <= filled[0])
    last = min(i for i in decades if i > filled[-1])
    shown, top, step = counts[first:last], max(counts) or 1, _ROOM / (last - first)
    marks = [_bar(_LEFT + i * step, step * 0.9, count / top, _BLUE) for i, count in enumerate(shown)]
    ticks = [(_LEFT + (i - first) * step, f"{edges[i]:g}") for i in decades if first <= i <= last]
    per_nat = (last - first) / math.log10(edges[last] / edges[first])
    for name, value, level in (("mean", report.mean_kl, 20), ("99th percentile", report.p99_kl, 34)):
        if edges[first] <= value <= edges[last]:
            x = _LEFT + math.log10(value / edges[first]) * per_nat * step
            marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{level - 10}" y2="{_y(0):.1f}" stroke="{_ORANGE}"/>')
            anchor, off = ("end", -5) if x > _LEFT + _ROOM * 0.8 else ("start", 5)
            label = f"{name} {value:.3g}"
            marks.append(f'<text x="{x + off:.1f}" y="{level}" text-anchor="{anchor}" {_HALO}>{label}</text>')
    return _plot(marks, ticks, [(share, f"{share * top:.0f}") for share in (0, 0.5, 1)])


def _sizes(points: Sequence[Beside]) -> str:
    floor = min((point.mean_kl for point in points if point.mean_kl > 0), default=1.0)
    low, high = math.log10(floor) - 0.2, math.log10(max(*(point.mean_kl for point in points), floor)) + 0.2
    smallest, largest = (
        min(point.size_bytes for point in points) * 0.95,
        max(point.size_bytes for point in points) * 1.05,
    )
    marks = []
    for i, point in enumerate(points):
        x = _LEFT + _ROOM * (point.size_bytes - smallest) / (largest - smallest)
        y = _y((math.log10(max(point.mean_kl, floor)) - low) / (high - low))
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_ORANGE if i == 0 else _BLUE}"/>')
        # The text goes to the side where there is more room.
        anchor, beside = ("start", 8) if x < _LEFT + _ROOM / 2 else ("end", -8)
        label = escape(point.recipe if len(point.recipe) <= _LABEL else point.recipe[: _LABEL - 1] + "…")
        marks.append(f'<text x="{x + beside:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{label}</text>')
    ticks = [(_LEFT + _ROOM * share, f"{(smallest + share * (largest - smallest)) / 1e6:.3g}") for share in (0, 0.5, 1)]
    return _plot(marks, ticks, [(share, f"{10 ** (low + share * (high - low)):.2g}") for share in (0, 0.5, 1)])


def _bar(x: float, width: float, share: float, colour: str) -> str:
    y = _y(share)
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_y(0) - y:.1f}" fill="{colour}"/>'


def _y(share: float) -> float:
    return 8 + (_HEIGHT - _BOTTOM - 8) * (1 - share)


def _plot(marks: Sequence[str], ticks: Sequence[tuple[float, str]], levels: Sequence[tuple[float, str]]) -> str:
    lines = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for share, label in levels:
        y = _y(share)
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    lines += marks
    lines += [f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{label}</text>' for x, label in ticks]
    return "\n".join([*lines, "</svg>"])
