"""Feeds sequences in given steps and keeps the logits at given positions: how parity is checked."""

from collections.abc import Sequence

import numpy as np

from galerne.runtime.engines.engine import Float32, Int64
from galerne.runtime.rows import Rows


def feed_steps(
    rows: Rows, sequences: Sequence[Int64], steps: Sequence[Sequence[int]], positions: Sequence[Int64]
) -> list[Float32]:
    """Feed each row a prefix of its sequence, run by run.

    Args:
        sequences: token ids for each row.
        steps: for each run the number of tokens that each row gets.
        positions: for each row the positions whose logits are wanted, ascending.
    Returns: for each row [positions, vocab_size] float32.
    """
    parts: list[list[Float32]] = [[] for _ in positions]
    for counts in steps:
        spans = [(start, start + count) for start, count in zip(rows.lengths, counts, strict=True)]
        fed = [sequence[start:end].tolist() for sequence, (start, end) in zip(sequences, spans, strict=True)]
        keep = [
            (wanted[(wanted >= start) & (wanted < end)] - start).tolist()
            for wanted, (start, end) in zip(positions, spans, strict=True)
        ]
        for part, logits in zip(parts, rows.feed_all(fed, keep=keep), strict=True):
            part.append(logits)
    return [np.concatenate(part) for part in parts]
