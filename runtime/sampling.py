"""Picks the next token from the logits: greedily, or at random from a distribution cut as transformers cuts it."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from galerne.errors import BackendError, InputError


@dataclass(frozen=True)
class SamplingOptions:
    """How to pick tokens. Raises: InputError if a value is out of range.

    temperature: 0 always picks the most likely token, and the other options do not matter then.
    top_k: keep the k most likely tokens, and those as likely as the last of them.
    top_p: of these keep the fewest most likely ones whose probabilities sum to p.
    min_p: of these keep the ones at least min_p times as likely as the most likely one.
    seed: the same seed gives the same tokens; None gives others each time.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        _require("temperature", self.temperature, "0 (greedy) or more, and finite", 0 <= self.temperature < math.inf)
        _require("top_k", self.top_k, "1 or more", self.top_k is None or self.top_k >= 1)
        _require("top_p", self.top_p, "more than 0, at most 1", self.top_p is None or 0 < self.top_p <= 1)
        _require("min_p", self.min_p, "from 0 to 1", self.min_p is None or 0 <= self.min_p <= 1)
        _require("seed", self.seed, "0 or more", self.seed is None or self.seed >= 0)


class Sampler:
    """Picks one token at a time, for one generation."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._generator = np.random.Generator(np.random.PCG64(options.seed))

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Pick a token.

        Args:
            logits: [vocab_size] float32; -inf for a token that must not come.
        Returns: the token's id. Greedy takes the lowest one among equals.
        Raises: BackendError if the largest logit is NaN or infinite.
        """
        if self._options.temperature == 0:
            return _most_likely(logits)
        ids, probabilities = self.probabilities(logits)
        cumulative = np.cumsum(probabilities, dtype=np.float64)
        at = np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right")
        return int(ids[min(int(at), len(ids) - 1)])

    def probabilities(self, logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the distribution that `sample` draws from; a temperature of 0 counts as greedy here too.

        Args:
            logits: [vocab_size] float32.
        Returns: the ids that are left, [n] int64 in rising order, and their probabilities, [n] float32, which sum to 1.
        Raises: BackendError as `sample` does.
        Source: transformers' Temperature-, TopK-, TopP- and MinPLogitsWarper, in the order of its `generate`.
            Among equals at the border of top_p the lower ids stay; transformers keeps those that its sort puts last.
        """
        options = self._options
        best = _most_likely(logits)
        if options.temperature == 0:
            return np.array([best]), np.ones(1, np.float32)
        ids: npt.NDArray[np.int64] | None = None
        kept = logits
        if options.top_k is not None and options.top_k < len(logits):
            ids = np.flatnonzero(logits >= np.partition(logits, -options.top_k)[-options.top_k])
            kept = logits[ids]
        # The largest becomes 0 first, so that no temperature, however small, makes it overflow.
        with np.errstate(over="ignore"):
            weights = np.exp((kept - logits[best]) / np.float32(max(options.temperature, 1e-30)))
        keep = weights > 0
        if options.top_p is not None and options.top_p < 1:
            keep &= _nucleus(weights, options.top_p)
        if options.min_p is not None:
            keep &= weights >= np.float32(options.min_p)  # the largest weight is exp(0) = 1
        left = np.flatnonzero(keep)
        weights = weights[left]
        return (left if ids is None else ids[left]), weights / weights.sum()


def _most_likely(logits: npt.NDArray[np.float32]) -> int:
    """Return the lowest id of the largest logit. NaN counts as largest in NumPy, so looking at that one finds any."""
    best = int(np.argmax(logits))
    if not math.isfinite(logits[best]):
        found = "NaN" if math.isnan(logits[best]) else "no finite largest value"
        raise BackendError(
            f"logits: {found} at token {best}, expected finite numbers: the engine overflowed; run `galerne verify`, "
            "or export with --precision fp32"
        )
    return best


def _nucleus(weights: npt.NDArray[np.float32], top_p: float) -> npt.NDArray[np.bool_]:
    """Say which weights belong to the fewest largest ones whose share of the sum reaches `top_p`.

    Sorts only weights that may belong: those below (1 - top_p) / n of the sum make up less than 1 - top_p together.
    """
    total = float(weights.sum(dtype=np.float64))
    candidates = np.flatnonzero(weights >= total * (1 - top_p) / len(weights))
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    cumulative = np.cumsum(weights[order], dtype=np.float64)
    # A token stays while the ones before it do not reach top_p; the first always stays.
    count = 1 + int(np.searchsorted(cumulative[:-1], total * top_p, side="left"))
    keep = np.zeros(len(weights), np.bool_)
    keep[order[:count]] = True
    return keep


def _require(name: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise InputError(f"{name}: expected {expected}, found {value!r}")
