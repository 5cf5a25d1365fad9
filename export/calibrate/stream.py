"""Rounds a model layer by layer, each on what the rounded layers before it make of the calibration text."""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from galerne.errors import InputError
from galerne.export.calibrate.compressed import Scheme, tensors_of
from galerne.export.calibrate.folder import QuantizedFolder, as_stored
from galerne.export.calibrate.layers import Group, Int64, LayerRun, Layers
from galerne.export.calibrate.rounded import RoundedWeight, round_weight, uses_hessian
from galerne.export.calibrate.source import HEAD, LayerWeights, layer_prefix
from galerne.export.calibrate.statistics import Statistics
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.streamed import StreamedModel
from galerne.optimize.quantize.recipe import Method, Recipe
from galerne.progress import Task


class Stream:
    """The pass of a checkpoint through a recipe into a folder.

    schemes: of each product that is quantized, by its module's name. ignored: the linear modules that are not.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, ids: Int64, *, tied: bool) -> None:
        """Prepare.

        Args:
            ids: the calibration text, [sequences, S].
            tied: whether the vocabulary projection is the embedding table.
        Raises: InputError if transformers does not know the model, or a block does not divide.
        """
        self._checkpoint, self._recipe, self._ids = checkpoint, recipe, ids
        self._weights = LayerWeights(checkpoint, tied=tied)
        self._layers = Layers(StreamedModel(checkpoint, substitute=self._weights))
        linear = {
            name: module.in_features
            for name, module in self._layers.model.named_modules()
            if isinstance(module, nn.Linear)
        }
        forms = {name: recipe.format_for(f"{name}.weight") for name in linear}
        self.ignored = [name for name, form in forms.items() if form.bits is None]
        self.schemes = {
            name: Scheme.of(f"{name}.weight", form, linear[name], rounds_input=self._rounds_input(name))
            for name, form in forms.items()
            if form.bits is not None
        }
        self._runs = recipe.method in ("gptq", "awq") or recipe.activations is not None

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
        folder.write(self.count, self._rest())

    def _rounds_input(self, module: str) -> bool:
        return self._recipe.activations is not None and f"{module}.weight" != HEAD

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
        if self._runs:
            hidden = folder.hidden(number)
            groups = self._layers.groups(number, hidden[0])
            run = LayerRun(self._layers, number, hidden, folder.scratch)
            try:
                for group in groups:
                    rounded |= self._group(number, group, run)
                    task.advance(1 / len(groups))
                self._carry_on(folder, number, run)
            finally:
                run.close()
        else:
            rounded = self._round(
                [f"{module}.weight" for module in self.schemes if module.startswith(layer_prefix(number))], None
            )
            task.advance()
        folder.write(number, self._tensors(layer_prefix(number), rounded))

    def _group(self, number: int, group: Group, run: LayerRun) -> dict[str, RoundedWeight]:
        """Round the products that read one input."""
        names = [f"{layer_prefix(number)}{product}.weight" for product in group.products]
        hessian = any(uses_hessian(self._recipe.format_for(name), self._recipe.method) for name in names)
        statistics = None
        for x in run.inputs(group):
            if statistics is None:
                statistics = Statistics(x.shape[1], hessian=hessian)
            statistics.add(x)
        return self._round([name for name in names if name.removesuffix(".weight") in self.schemes], statistics)

    def _round(self, names: list[str], statistics: Statistics | None) -> dict[str, RoundedWeight]:
        rounded = {}
        for name in names:
            form, weight = self._recipe.format_for(name), self._weights(name).numpy()
            rounded[name] = round_weight(
                name, weight, form, self._recipe.method, statistics, str(self._checkpoint.path)
            )
            self._weights.replace(name, torch.from_numpy(rounded[name].dequantized()))
        return rounded

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

    def _rest(self) -> dict[str, Tensor]:
        """Return what belongs to no layer: the table, the last norm, the vocabulary projection."""
        self._weights.enter(self.count)
        tensors = {
            name: as_stored(self._checkpoint, name)
            for name in self._checkpoint.shapes()
            if not name.startswith("model.layers.")
            and not (name == HEAD and (self._weights.tied or self._head_rounded))
        }
        if self._head_rounded:
            form, method = self._recipe.format_for(HEAD), self._recipe.method
            plain: Method = "nearest" if method == "nearest" else "search"
            weight = self._weights.read(HEAD).numpy()
            head = round_weight(HEAD, weight, form, plain, None, str(self._checkpoint.path))
            tensors |= tensors_of(HEAD.removesuffix(".weight"), head)
        return tensors

    @cached_property
    def _head_rounded(self) -> bool:
        return HEAD.removesuffix(".weight") in self.schemes
