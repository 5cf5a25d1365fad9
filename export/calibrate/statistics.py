"""What is gathered of a product's inputs over all calibration tokens."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float32 = npt.NDArray[np.float32]

# Columns of X^T X that are computed at once: what lies above the diagonal's block is left out.
_COLUMNS = 1024


class Statistics:
    """Sums over the inputs x [tokens, in] of products that share them.

    tokens: how many there were.
    """

    def __init__(self, width: int, *, hessian: bool, rows: int = 0) -> None:
        """Begin with nothing.

        Args:
            hessian: whether to sum X^T X, [in, in] float32.
            rows: about how many of each sequence's inputs to keep, evenly spread.
        """
        self.tokens = 0
        self._sum = torch.zeros(width, width) if hessian else None
        self._whole = False
        self._max, self._square = torch.zeros(width), torch.zeros(width)
        self._rows, self._kept = rows, list[Tensor]()

    @torch.inference_mode()
    def add(self, x: Tensor) -> None:
        """Count one sequence's inputs, [S, in]."""
        assert not self._whole
        self.tokens += len(x)
        torch.maximum(self._max, x.abs().amax(0), out=self._max)
        self._square += x.square().sum(0)
        if self._rows:
            self._kept.append(x[:: max(1, len(x) // self._rows)].clone())
        if self._sum is not None:
            for first in range(0, x.shape[1], _COLUMNS):
                last = first + _COLUMNS
                self._sum[first:, first:last].addmm_(x[:, first:].T, x[:, first:last])

    @property
    def max_abs(self) -> Float32:
        """The largest magnitude of each input channel, [in]."""
        return self._max.numpy()

    @property
    def mean_square(self) -> Float32:
        """The mean square of each input channel, [in]; a little more than that, so that none is 0."""
        mean = self._square / self.tokens
        found: Float32 = (mean + (float(mean.mean()) * 1e-6 or 1.0)).numpy()
        return found

    @property
    def rows(self) -> Float32:
        """The inputs that were kept, [rows, in]."""
        kept: Float32 = torch.cat(self._kept).numpy()
        return kept

    @property
    def hessian(self) -> Float32:
        """X^T X / tokens, [in, in]; nothing can be added after it was asked for."""
        assert self._sum is not None
        if not self._whole:
            self._sum /= self.tokens
            for first in range(0, len(self._sum), _COLUMNS):
                last = first + _COLUMNS
                self._sum[first:last, last:] = self._sum[last:, first:last].T
            self._whole = True
        hessian: Float32 = self._sum.numpy()
        return hessian

    @torch.inference_mode()
    def divide(self, factors: Float32) -> None:
        """Make the statistics those of inputs whose channels are divided by factors [in]."""
        by = torch.from_numpy(factors)
        self._max /= by
        self._square /= by.square()
        self._kept = [rows / by for rows in self._kept]
        if self._sum is not None:
            self._sum /= by
            self._sum /= by[:, None]
