"""What a measurement of quality found, as a record and as JSON."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from galerne.errors import InputError
from galerne.export.quality.distance import Distance
from galerne.export.quality.layers import LayerError
from galerne.export.quality.thresholds import Thresholds
from galerne.runtime.measures import plain

# The histogram's bins: so many for each power of ten of KL, from the first to the last, in nats.
_FIRST_DECADE, _LAST_DECADE, _BINS_PER_DECADE = -6, 2, 4


@dataclass(frozen=True)
class Histogram:
    """How many positions have a KL within each bin.

    edges: in nats, one more than counts; the first and the last bin also hold what lies beyond.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class QualityReport:
    """A bundle on text, beside its source.

    engine: what ran the bundle. recipe: its recipe in its own words.
    text: the file's name; tokens, sequences: how much of it was fed.
    perplexity, source_perplexity: exp of the mean negative log likelihood of the next token.
    mean_kl, p99_kl: KL(source, bundle) in nats over all positions, the mean and the 99th percentile.
    top1_agreement: the share of positions with the same likeliest token.
    size_bytes: of the graph and its weights.
    layers: the error that each decoder layer adds, and the error so far.
    failures: which limits were not kept, a line each.
    """

    passed: bool
    engine: str
    recipe: str
    text: str
    tokens: int
    sequences: int
    perplexity: float
    source_perplexity: float
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    size_bytes: int
    thresholds: Thresholds
    failures: tuple[str, ...]
    layers: tuple[LayerError, ...]
    histogram: Histogram

    def to_json(self) -> bytes:
        """Return the report as UTF-8 JSON; five digits a number, and null for what is not finite."""
        return (json.dumps(plain(self, digits=5), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


@dataclass(frozen=True)
class Beside:
    """Another bundle's report, as far as a plot shows it."""

    recipe: str
    size_bytes: int
    mean_kl: float


def read_beside(path: Path) -> Beside:
    """Read what a plot shows of a report that was written before.

    Raises: InputError if the file is no such report.
    """
    try:
        tree = json.loads(path.read_bytes())
        return Beside(str(tree["recipe"]), int(tree["size_bytes"]), float(tree["mean_kl"]))
    except OSError as exc:
        raise InputError(f"--beside {path}: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise InputError(f"--beside {path}: not the JSON of `galerne quality` ({exc!r})") from exc


def judge(found: Distance, limits: Thresholds) -> dict[str, Any]:
    """Return the report's measures and its verdict, by the report's names."""
    perplexity, source = _perplexity(found.nll), _perplexity(found.source_nll)
    measures = {
        "perplexity": perplexity,
        "source_perplexity": source,
        "mean_kl": float(found.kl.mean()),
        "p99_kl": float(np.quantile(found.kl, 0.99)),
        "top1_agreement": float(found.agrees.mean()),
    }
    checks = (
        ("perplexity over the source's", perplexity / source, limits.max_perplexity_ratio, False),
        ("mean_kl", measures["mean_kl"], limits.max_mean_kl, False),
        ("p99_kl", measures["p99_kl"], limits.max_p99_kl, False),
        ("top1_agreement", measures["top1_agreement"], limits.min_top1_agreement, True),
    )
    failures = []
    if not math.isfinite(measures["mean_kl"]):  # NaN or infinite logits: no limit is needed to see that
        failures.append("the bundle's logits are not finite")
    for name, value, limit, at_least in checks:
        # Written so that NaN fails.
        if limit is not None and not (value >= limit if at_least else value <= limit):
            failures.append(f"{name} {value:.4g} is {'under' if at_least else 'over'} {limit:.4g}")
    return {**measures, "failures": tuple(failures), "passed": not failures, "histogram": _histogram(found)}


def _perplexity(nll: Any) -> float:
    mean = float(nll.mean())
    return math.exp(mean) if mean < 700 else math.inf


def _histogram(found: Distance) -> Histogram:
    edges = np.logspace(_FIRST_DECADE, _LAST_DECADE, (_LAST_DECADE - _FIRST_DECADE) * _BINS_PER_DECADE + 1)
    finite = np.clip(found.kl[np.isfinite(found.kl)], edges[0], edges[-1])
    counts, _ = np.histogram(finite, edges)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))
