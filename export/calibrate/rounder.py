"""Rounds one layer's weights, product by product, on what is gathered of their inputs."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from galerne.export.calibrate.compressed import Scheme
from galerne.export.calibrate.fold import Fold, bounded, divide
from galerne.export.calibrate.layers import Float32
from galerne.export.calibrate.rounded import LARGEST, RoundedWeight, round_weight, uses_hessian
from galerne.export.calibrate.source import LayerWeights
from galerne.export.calibrate.statistics import Statistics
from galerne.export.spec import DecoderSpec
from galerne.optimize.quantize.awq import awq_factors
from galerne.optimize.quantize.recipe import Recipe
from galerne.optimize.quantize.smooth import smooth_factors

# Inputs that AWQ's factors are searched on.
_ROWS = 1024


class Rounder:
    """Rounds by a recipe; the layer computes with what is rounded from then on.

    rounded: the current layer's weights that were rounded, by name.
    """

    def __init__(
        self,
        recipe: Recipe,
        spec: DecoderSpec,
        weights: LayerWeights,
        schemes: Mapping[str, Scheme],
        sequences: int,
        where: str,
    ) -> None:
        """Prepare.

        Args:
            weights: are changed.
            schemes: of each product that is quantized, by its module's name.
            sequences: how many the inputs come in.
            where: the checkpoint, for messages.
        """
        self._recipe, self._spec, self._schemes, self._where = recipe, spec, schemes, where
        self._rows = max(1, _ROWS // sequences) if recipe.method == "awq" else 0
        self.weights = weights
        self.rounded: dict[str, RoundedWeight] = {}

    def quantized(self, names: Iterable[str]) -> list[str]:
        """Return those of some weights that are quantized."""
        return [name for name in names if name.removesuffix(".weight") in self._schemes]

    def folds(self, fold: Fold, quantized: list[str]) -> bool:
        """Whether an input's channels are divided by factors that the quantized weights which read it take up."""
        if self._recipe.smoothing is not None and any(map(self._recipe.inputs_of, quantized)):
            return True
        # AWQ searches for a factor by channel, so none for places that several channels read.
        return self._recipe.method == "awq" and bool(quantized) and fold.readers == 1

    def statistics(self, names: list[str], inputs: Iterable[Tensor], *, hessian: bool = True) -> Statistics:
        """Gather what rounding some weights needs of the input that they share, [tokens, in] from each sequence."""
        hessian = hessian and any(uses_hessian(self._recipe.format_for(name), self._recipe.method) for name in names)
        statistics = None
        for x in inputs:
            if statistics is None:
                statistics = Statistics(x.shape[1], hessian=hessian, rows=self._rows)
            statistics.add(x)
        assert statistics is not None
        return statistics

    def fold(
        self, prefix: str, fold: Fold, readers: list[str], quantized: list[str], statistics: Statistics
    ) -> Float32:
        """Divide an input's channels by factors, where they are made and in its statistics.

        Args:
            prefix: of the layer's names.
            readers: all weights that read the input; they take the factors up. quantized: those that the factors are for.
        Returns: the factors, [places]; see `Fold`.
        """
        of_places = bounded(self._factors(quantized, statistics, fold), fold, prefix, self.rounded)
        divide(of_places, fold, prefix, self._spec, self.weights, self.rounded)
        factors = fold.by_channel(of_places)
        statistics.divide(factors)
        for name in readers:
            self.weights.replace(name, self.weights(name) * torch.from_numpy(factors))
        return of_places

    def round(self, name: str, statistics: Statistics | None) -> None:
        """Round a weight. Raises: InputError if a value is too large for a scale in float16."""
        recipe, weight = self._recipe, self.weights(name).numpy()
        made = round_weight(name, weight, recipe.format_for(name), recipe.method, statistics, self._where)
        if (inputs := recipe.inputs_of(name)) is not None:
            assert statistics is not None
            largest = float(statistics.max_abs.max()) or 1.0
            made = replace(made, input_scale=largest / LARGEST[inputs])
        self.rounded[name] = made
        self.weights.replace(name, torch.from_numpy(made.dequantized()))

    def _factors(self, names: list[str], statistics: Statistics, fold: Fold) -> Float32:
        """Return the factors of products that share an input, by the places that it comes from."""
        weights = [self.weights(name).numpy() for name in names]
        if self._recipe.smoothing is not None:
            largest = fold.by_place(statistics.max_abs[None]).max(axis=0)
            return smooth_factors([fold.by_place(weight) for weight in weights], largest, self._recipe.smoothing)
        form = self._recipe.format_for(names[0])
        assert form.bits is not None
        block = form.block_for(weights[0].shape[1], names[0])
        return awq_factors(weights, statistics.rows, form.bits, block, name=f"{self._where}: {names[0]}")
