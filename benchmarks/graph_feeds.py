"""What a bundle's graph takes to read one sequence from its start: docs/graph.md."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PAST = "past_key_values."
_RINGS = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


def feeds(inputs: Sequence[Any], ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return the feeds of the whole sequence as one chunk, with logits after each token.

    Args:
        inputs: of ONNX Runtime's session on a float32 graph.
        ids: [length] int64.
    """
    positions = np.arange(len(ids))
    found: dict[str, NDArray[Any]] = {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "write_indices": np.zeros(1, np.int64),
        "logit_indices": positions[None],
    }
    for each in inputs:
        if each.name.startswith(_PAST):  # [batch_size, heads, slots, head_dim]: an empty ring that holds the sequence
            found[each.name] = np.zeros((1, each.shape[1], len(ids), each.shape[3]), _RINGS[each.type])
    return found
