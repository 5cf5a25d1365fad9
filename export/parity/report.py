"""What a parity run found: as records, as JSON, and as a page."""

import json
import math
from dataclasses import dataclass
from html import escape

from galerne.export.page import page, verdict_class
from galerne.runtime.measures import CaseResult, Limits, plain


@dataclass(frozen=True)
class AgainstSource:
    """The bundle against the checkpoint as it is, unrounded: what the recipe costs, on random tokens. No criterion."""

    case: str
    max_abs: float
    mean_kl: float
    top1_agreement: float


@dataclass(frozen=True)
class Unrounded:
    """The proof of a graph that rounds inputs of products, or keys and values: of the rounding, and of the graph without it.

    arithmetic, tolerances: as in `Report`, for the cases that run without it.
    """

    arithmetic: str
    tolerances: Limits
    cases: tuple[CaseResult, ...]


@dataclass(frozen=True)
class Report:
    """A verdict, and everything that it rests on.

    engine: "portable" or the engine's name.
    recipe: the bundle's recipe in its own words.
    reference: what the bundle was compared with.
    arithmetic: the row of the tolerance table that holds.
    logits_std: the standard deviation of the reference's logits, which the limits are scaled by.
    unrounded: only where inputs, or keys and values, are rounded.
    """

    passed: bool
    engine: str
    recipe: str
    reference: str
    arithmetic: str
    logits_std: float
    tolerances: Limits
    cases: tuple[CaseResult, ...]
    against_source: AgainstSource
    unrounded: Unrounded | None = None

    @property
    def all_cases(self) -> tuple[CaseResult, ...]:
        """The cases as the bundle runs, and those of `unrounded`."""
        return self.cases + (self.unrounded.cases if self.unrounded is not None else ())

    def to_json(self) -> bytes:
        """Return the report as UTF-8 JSON without times or paths; four digits a number, and null for NaN."""
        tree = plain(self)
        if self.unrounded is None:
            del tree["unrounded"]
        return (json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


_TABLE = """<table>
<thead><tr><th>Case</th><th>Tokens</th><th>max_abs</th><th>mean_kl, nats</th><th>top1</th>
<th>max_abs, log scale; full is the limit</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>"""
_BAR_DECADES = 6.0


def html(report: Report) -> str:
    """Return a report as one page that needs nothing beside itself."""
    limits, source = report.tolerances, report.against_source
    facts = {
        "Engine": report.engine,
        "Recipe": report.recipe,
        "Reference": report.reference,
        "Arithmetic": report.arithmetic,
        "Limits": _limits(limits),
        "Their source": limits.source,
        "Against the source": f"{source.case}, weights as they are: max_abs {_number(source.max_abs)}, mean_kl "
        f"{_number(source.mean_kl)}, top1_agreement {_number(source.top1_agreement)}; no criterion",
    }
    rows = "\n".join(_row(case, limits.max_abs) for case in report.cases)
    if report.unrounded is not None:
        tight = report.unrounded.tolerances
        facts |= {"Limits, not rounded": f"{report.unrounded.arithmetic}: {_limits(tight)}"}
        rows += "\n" + "\n".join(_row(case, tight.max_abs) for case in report.unrounded.cases)
    return page("Parity", report.passed, facts, _TABLE.format(rows=rows))


def _limits(limits: Limits) -> str:
    return (
        f"max_abs {_number(limits.max_abs)}, mean_kl {_number(limits.max_mean_kl)}, top1_agreement "
        f"{_number(limits.min_top1_agreement)}{', greedy tokens identical' if limits.greedy else ''}"
    )


def _row(case: CaseResult, limit: float) -> str:
    cells = (str(case.tokens), _number(case.max_abs), _number(case.mean_kl), _number(case.top1_agreement))
    line = f"<tr><td>{escape(case.name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells)
    bar = f'<div class="{verdict_class(case.passed)}" style="width: {_width(case, limit):.0f}%"></div>'
    line += f'<td class="bar"><div class="track">{bar}</div></td></tr>'
    if case.failures:
        line += f'\n<tr><td class="why" colspan="6">{escape("; ".join(case.failures))}</td></tr>'
    return line


def _width(case: CaseResult, limit: float) -> float:
    """Return a bar's length in percent: full at the limit, empty six decades under it."""
    if case.max_abs is None or not case.max_abs <= limit:
        return 100.0 if not case.passed else 0.0
    return 100 * max(0.0, 1 + math.log10(max(case.max_abs, 1e-30) / limit) / _BAR_DECADES)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
