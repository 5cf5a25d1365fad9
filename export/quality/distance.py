"""How far two models' distributions over the next token are apart, token by token."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from galerne.runtime.measures import log_softmax

Array = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Distance:
    """Measures of each position of one or more sequences, one after the other.

    kl: KL(source, bundle) in nats, [positions].
    agrees: whether both find the same token likeliest, [positions].
    source_nll, nll: negative log likelihood in nats of the token that comes next, [positions that have one].
    """

    kl: Array
    agrees: npt.NDArray[np.bool_]
    source_nll: Array
    nll: Array

    @staticmethod
    def join(parts: list["Distance"]) -> "Distance":
        """Put the measures of several sequences one after the other."""
        return Distance(
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.agrees for part in parts]),
            np.concatenate([part.source_nll for part in parts]),
            np.concatenate([part.nll for part in parts]),
        )


def distance(ids: Int64, source: Float32, bundle: Float32) -> Distance:
    """Compare what two models say after each token of a sequence.

    Args:
        ids: [S] int64, the tokens.
        source, bundle: logits after each of them, [S, vocab_size] float32.
    """
    kl, source_nll, nll = [], [], []
    for position, (one, other) in enumerate(zip(source, bundle, strict=True)):
        p, q = log_softmax(one), log_softmax(other)
        kl.append(float((np.exp(p) * (p - q)).sum()))
        if position + 1 < len(ids):
            source_nll.append(-p[ids[position + 1]])
            nll.append(-q[ids[position + 1]])
    agrees = (source.argmax(axis=1) == bundle.argmax(axis=1)) & ~np.isnan(bundle).any(axis=1)
    return Distance(np.array(kl), agrees, np.array(source_nll), np.array(nll))
