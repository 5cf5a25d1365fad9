"""What a bundle's quality must reach: limits from a TOML file."""

from dataclasses import dataclass, fields
from pathlib import Path

import tomllib

from galerne import schema
from galerne.errors import InputError


@dataclass(frozen=True)
class Thresholds:
    """Limits; None sets none.

    max_perplexity_ratio: the bundle's perplexity over the source's.
    max_mean_kl, max_p99_kl: KL(source, bundle) in nats, the mean over positions and the 99th percentile.
    min_top1_agreement: the share of positions with the same likeliest token.
    """

    max_perplexity_ratio: float | None = None
    max_mean_kl: float | None = None
    max_p99_kl: float | None = None
    min_top1_agreement: float | None = None


def load(path: Path) -> Thresholds:
    """Read limits from a TOML file.

    Raises: InputError if it cannot be read, a key is unknown or of the wrong type, or it sets no limit at all.
    """
    try:
        tree = tomllib.loads(path.read_bytes().decode())
    except OSError as exc:
        raise InputError(f"--thresholds {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise InputError(f"--thresholds {path}: not TOML ({exc})") from exc
    limits = schema.read(Thresholds, tree, str(path))
    if limits == Thresholds():
        raise InputError(f"{path}: sets no limit; expected one of {', '.join(f.name for f in fields(Thresholds))}")
    for field in fields(Thresholds):
        value = getattr(limits, field.name)
        if value is not None and value < 0:
            raise InputError(f"{path}: {field.name}: expected at least 0, found {value}")
    return limits
