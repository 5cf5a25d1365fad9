"""Rounds a model layer by layer, each on what the rounded layers before it make of the calibration text."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from galerne.errors import InputError
from galerne.export.calibrate.cache import AFTER_CACHE, CacheRanges
from galerne.export.calibrate.compressed import Scheme, cache_tensors, tensors_of
from galerne.export.calibrate.fold import Fold, bounded, divide, fold_of
from galerne.export.calibrate.folder import QuantizedFolder, as_stored
from galerne.export.calibrate.layers import Float32, Group, Int64, LayerRun, Layers
from galerne.export.calibrate.rounded import LARGEST, RoundedWeight, round_weight, uses_hessian
from galerne.export.calibrate.source import LayerWeights, layer_prefix
from galerne.export.calibrate.statistics import Statistics
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.streamed import StreamedModel
from galerne.export.spec import DecoderSpec
from galerne.optimize.quantize.awq import awq_factors
from galerne.optimize.quantize.recipe import Recipe
from galerne.optimize.quantize.smooth import smooth_factors
from galerne.progress import Task
from galerne.runtime.footprint import HEAD

# Inputs that AWQ's factors are searched on.
_ROWS = 1024


class Stream:
    """The pass of a checkpoint through a recipe into a folder.

    schemes: of each product that is quantized, by its module's name. ignored: the linear modules that are not.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, spec: DecoderSpec, ids: Int64) -> None:
        """Prepare.

        Args:
            spec: of the checkpoint's model.
            ids: the calibration text, [sequences, S].
        Raises: InputError if transformers does not know the model, or a block does not divide.
        """
        self._checkpoint, self._recipe, self._spec, self._ids = checkpoint, recipe, spec, ids
        self._weights = LayerWeights(checkpoint, tied=spec.tie_word_embeddings)
        self._layers = Layers(StreamedModel(checkpoint, substitute=self._weights))
        linear = {
            name: module.in_features
            for name, module in self._layers.model.named_modules()
            if isinstance(module, nn.Linear)
        }
        forms = {name: recipe.format_for(f"{name}.weight") for name in linear}
        self.ignored = [name for name, form in forms.items() if form.bits is None]
        self.schemes = {
            name: Scheme.of(f"{name}.weight", form, linear[name], recipe.inputs_of(f"{name}.weight"))
            for name, form in forms.items()
            if form.bits is not None
        }
        self._groups: tuple[Group, ...] = ()
        self._runs = recipe.method in ("gptq", "awq") or recipe.activations is not None or recipe.cache is not None

    @property
    def count(self) -> int:
        """How many decoder layers there are."""
        return len(self._layers.modules)

    def run(self, folder: QuantizedFolder) -> None:
        """Write every layer that is not there yet, and then the rest.

        Raises: InputError on a weight that is not finite, or too large for float16.
        """
        done = folder.layers_done()
        folder.clear(done)
        if self._runs:
            self._enter(folder, fresh=done == 0)
        with Task("quantize", self.count - done) as task:
            for number in range(done, self.count):
                self._layer(folder, number, task)
                folder.clear(number + 1)
        folder.write(self.count, self._rest(folder))

    def _enter(self, folder: QuantizedFolder, *, fresh: bool) -> None:
        """Run the embedding on the text; on one sequence only where the hidden states are there and the layers' calls are not."""
        first = self._layers.embed(self._ids[0])
        if fresh:
            hidden = folder.new_hidden((len(self._ids), *first.shape))
            for number, ids in enumerate(self._ids):
                hidden[number] = first if number == 0 else self._layers.embed(ids)
            folder.keep_hidden(0, hidden)

    def _layer(self, folder: QuantizedFolder, number: int, task: Task) -> None:
        self._weights.enter(number)
        rounded: dict[str, RoundedWeight] = {}
        cache: CacheRanges | None = None
        if self._runs:
            hidden = folder.hidden(number)
            if not self._groups:  # the same in all layers
                self._groups = self._layers.groups(number, hidden[0])
            run = LayerRun(self._layers, number, hidden, folder.scratch)
            try:
                for group in self._groups:
                    if self._recipe.cache is not None and group.products == (AFTER_CACHE,):
                        cache = CacheRanges(self._layers.modules[number], self._recipe.cache, run)
                    self._group(layer_prefix(number), group, run, rounded, cache)
                    task.advance(1 / len(self._groups))
                self._carry_on(folder, number, run)
            finally:
                run.close()
        else:
            prefix = layer_prefix(number)
            for name in (f"{module}.weight" for module in self.schemes if module.startswith(prefix)):
                self._round(name, None, rounded)
            task.advance()
        tensors = self._tensors(layer_prefix(number), rounded)
        folder.write(number, tensors if cache is None else tensors | cache_tensors(number, cache.scales()))

    def _group(
        self,
        prefix: str,
        group: Group,
        run: LayerRun,
        rounded: dict[str, RoundedWeight],
        cache: CacheRanges | None,
    ) -> None:
        """Round the products that read one input. `cache`: of the layer's keys and values, once they are known."""
        names = [f"{prefix}{product}.weight" for product in group.products]
        quantized = [name for name in names if name.removesuffix(".weight") in self.schemes]
        hessian = any(uses_hessian(self._recipe.format_for(name), self._recipe.method) for name in names)
        rows = max(1, _ROWS // len(self._ids)) if self._recipe.method == "awq" else 0
        statistics = None
        for x in run.inputs(group):
            if statistics is None:
                statistics = Statistics(x.shape[1], hessian=hessian, rows=rows)
            statistics.add(x)
        assert statistics is not None
        smoothed = self._recipe.smoothing is not None and any(map(self._recipe.inputs_of, quantized))
        factored = smoothed or (self._recipe.method == "awq" and quantized)
        fold = fold_of(group, self._spec) if factored else None
        if fold is not None and fold.readers > 1 and not smoothed:
            fold = None  # AWQ searches for a factor by channel
        if fold is not None:
            of_places = bounded(self._factors(quantized, statistics, fold), fold, prefix, rounded)
            divide(of_places, fold, prefix, self._spec, self._weights, rounded)
            factors = fold.by_channel(of_places)
            run.divide(group, factors)
            if cache is not None and group.products == (AFTER_CACHE,):
                cache.divide_values(of_places)
            statistics.divide(factors)
            for name in names:
                self._weights.replace(name, self._weights(name) * torch.from_numpy(factors))
        if group.closes is not None:  # from here on the module starts from what these products read
            for name in rounded:
                if name.startswith(f"{prefix}{group.closes}."):
                    self._weights.drop(name)
        for name in quantized:
            self._round(name, statistics, rounded)

    def _factors(self, names: list[str], statistics: Statistics, fold: Fold) -> Float32:
        """Return the factors of products that share an input, by the places that it comes from."""
        weights = [self._weights(name).numpy() for name in names]
        if self._recipe.smoothing is not None:
            largest = fold.by_place(statistics.max_abs[None]).max(axis=0)
            return smooth_factors([fold.by_place(weight) for weight in weights], largest, self._recipe.smoothing)
        form = self._recipe.format_for(names[0])
        assert form.bits is not None
        block = form.block_for(weights[0].shape[1], names[0])
        return awq_factors(weights, statistics.rows, form.bits, block, name=names[0])

    def _round(self, name: str, statistics: Statistics | None, rounded: dict[str, RoundedWeight]) -> None:
        recipe, weight = self._recipe, self._weights(name).numpy()
        made = round_weight(
            name, weight, recipe.format_for(name), recipe.method, statistics, str(self._checkpoint.path)
        )
        if (inputs := recipe.inputs_of(name)) is not None:
            assert statistics is not None
            largest = float(statistics.max_abs.max()) or 1.0
            made = replace(made, input_scale=largest / LARGEST[inputs])
        rounded[name] = made
        self._weights.replace(name, torch.from_numpy(made.dequantized()))

    def _carry_on(self, folder: QuantizedFolder, number: int, run: LayerRun) -> None:
        """Keep the hidden states after a layer."""
        following = folder.new_hidden(folder.hidden(number).shape)
        for sequence, states in enumerate(run.outputs()):
            if not np.isfinite(states).all():
                raise InputError(
                    f"{self._checkpoint.path}: layer {number}: its output on the calibration text holds NaN or infinity"
                )
            following[sequence] = states
        folder.keep_hidden(number + 1, following)

    def _tensors(self, prefix: str, rounded: Mapping[str, RoundedWeight]) -> dict[str, Tensor]:
        """Return what is written of the checkpoint's tensors of a prefix: rounded, changed, or as they are."""
        tensors: dict[str, Tensor] = {}
        for name in self._checkpoint.shapes():
            if not name.startswith(prefix) or name.endswith(".inv_freq"):
                continue
            if name in rounded:
                tensors |= tensors_of(name.removesuffix(".weight"), rounded[name])
            elif name in self._weights.changed:
                tensors[name] = self._weights(name)
            else:
                tensors[name] = as_stored(self._checkpoint, name)
            self._checkpoint.release(name)
        return tensors

    def _rest(self, folder: QuantizedFolder) -> dict[str, Tensor]:
        """Return what belongs to no layer: the table, the last norm, the vocabulary projection."""
        self._weights.enter(self.count)
        tensors = {
            name: as_stored(self._checkpoint, name)
            for name in self._checkpoint.shapes()
            if not name.startswith("model.layers.")
            and not (name == HEAD and (self._weights.tied or self._head_rounded))
        }
        if self._head_rounded:
            form, method, statistics = self._recipe.format_for(HEAD), self._recipe.method, None
            if self._weights.tied and form == self._recipe.table:
                method = "nearest"  # as the table is: the two stay one tensor
            if uses_hessian(form, method):
                statistics = Statistics(self._spec.hidden_size, hessian=True)
                for hidden in folder.hidden(self.count):
                    statistics.add(self._layers.final_norm(hidden))
            elif method != "nearest":
                method = "search"
            weight = self._weights.read(HEAD).numpy()
            head = round_weight(HEAD, weight, form, method, statistics, str(self._checkpoint.path))
            tensors |= tensors_of(HEAD.removesuffix(".weight"), head)
        return tensors

    @cached_property
    def _head_rounded(self) -> bool:
        return HEAD.removesuffix(".weight") in self.schemes
