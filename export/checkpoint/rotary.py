"""The two orders in which a head's rotated pairs are stored."""

from typing import Any

from numpy.typing import NDArray


def halves_apart(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Bring the rows of a query or key projection from pairs of neighbours into Hugging Face's order, the two halves of a head.

    Args:
        values: [heads * head_dim, ...]; head_dim is even.
        heads: how many heads the rows are.
    """
    # [heads, pairs, 2, ...] -> [heads, 2, pairs, ...]
    pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
