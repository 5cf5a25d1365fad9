"""Rounds a model layer by layer, each on what the rounded layers before it make of the calibration text."""

from functools import cached_property

import numpy as np
from torch import Tensor, nn

from galerne.errors import InputError
from galerne.export.calibrate.cache import AFTER_CACHE, CacheRanges
from galerne.export.calibrate.compressed import Scheme, cache_tensors, tensors_of
from galerne.export.calibrate.experts import BLOCK, EXPERTS, Routed, split_experts, stored_name
from galerne.export.calibrate.fold import fold_of
from galerne.export.calibrate.folder import QuantizedFolder, as_stored
from galerne.export.calibrate.layers import Group, Int64, LayerRun, Layers
from galerne.export.calibrate.mixture import round_mixture
from galerne.export.calibrate.rounded import round_weight, uses_hessian
from galerne.export.calibrate.rounder import Rounder
from galerne.export.calibrate.source import LayerWeights, layer_prefix
from galerne.export.calibrate.statistics import Statistics
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.streamed import StreamedModel
from galerne.export.spec import DecoderSpec
from galerne.optimize.quantize.recipe import Recipe
from galerne.progress import Task
from galerne.runtime.footprint import HEAD


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
        self._layers = Layers(StreamedModel(checkpoint, substitute=self._weights, prepare=split_experts))
        linear = {
            stored_name(name): module.in_features
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
        if spec.num_experts:  # no linear module of transformers, but one that other readers may take for such
            self.ignored += [f"{layer_prefix(number)}{BLOCK}.gate" for number in range(spec.num_hidden_layers)]
        self._rounder = Rounder(recipe, spec, self._weights, self.schemes, len(ids), str(checkpoint.path))
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
        self._rounder.rounded.clear()
        prefix = layer_prefix(number)
        cache: CacheRanges | None = None
        if self._runs:
            hidden, layer = folder.hidden(number), self._layers.modules[number]
            if not self._groups:  # the same in all layers
                self._groups = self._layers.groups(number, hidden[0])
            part = 1 / (len(self._groups) + self._spec.num_experts)
            run = LayerRun(self._layers, number, hidden, folder.scratch)
            try:
                for group in self._groups:
                    if self._recipe.cache is not None and group.products == (AFTER_CACHE,):
                        cache = CacheRanges(layer, self._recipe.cache, run)
                    self._group(prefix, group, run, cache)
                    task.advance(part)
                if self._spec.num_experts:
                    routed = Routed(run, folder.scratch(EXPERTS, hidden.shape))
                    for _ in round_mixture(prefix, layer, routed, self._rounder):
                        task.advance(part)
                self._carry_on(folder, number, run)
            finally:
                run.close()
        else:
            for name in (f"{module}.weight" for module in self.schemes if module.startswith(prefix)):
                self._rounder.round(name, None)
            task.advance()
        tensors = self._tensors(prefix)
        folder.write(number, tensors if cache is None else tensors | cache_tensors(number, cache.scales()))

    def _group(self, prefix: str, group: Group, run: LayerRun, cache: CacheRanges | None) -> None:
        """Round the products that read one input. `cache`: of the layer's keys and values, once they are known."""
        rounder, names = self._rounder, [f"{prefix}{product}.weight" for product in group.products]
        quantized = rounder.quantized(names)
        statistics = rounder.statistics(quantized, run.inputs(group))
        fold = fold_of(group, self._spec)
        if fold is not None and rounder.folds(fold, quantized):
            of_places = rounder.fold(prefix, fold, names, quantized, statistics)
            run.divide(group, fold.by_channel(of_places))
            if cache is not None and group.products == (AFTER_CACHE,):
                cache.divide_values(of_places)
        if group.closes is not None:  # from here on the module starts from what these products read
            for name in rounder.rounded:
                if name.startswith(f"{prefix}{group.closes}."):
                    self._weights.drop(name)
        for name in quantized:
            rounder.round(name, statistics)

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

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return what is written of the checkpoint's tensors of a prefix: rounded, changed, or as they are."""
        tensors, rounded = dict[str, Tensor](), self._rounder.rounded
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
            int4 = any(each.bits == 4 for each in self._recipe.formats)
            if self._weights.tied and form == self._recipe.table and int4:
                method = "nearest"  # as the table is: the two stay one tensor, and what that costs is lost in int4's own error
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
