"""Runs a model's decoder layers one at a time on many sequences, up to one product's input at a time.

What runs is transformers' own code. No product runs twice on the same input but one: where a module's result is its last
product's, as that of attention and of an MLP is, that product's inputs are kept and the module then starts from them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from galerne.export.parity.streamed import StreamedModel
from galerne.export.quality.layers import decoder_layers

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Products of a decoder layer that read one input; modules are named within the layer, as in "self_attn.q_proj".

    products: in the order in which they run.
    norm: the norm whose output they read; None where they read something else.
    closes: the module whose result is that of these products' last; None where there is none.
    in_tuple: how many results `closes` returns in a tuple, that of the product first; 0 if it is returned alone.
    """

    products: tuple[str, ...]
    norm: str | None
    closes: str | None
    in_tuple: int


class _Reached(Exception):  # noqa: N818 - no error: it ends a run that has gone far enough
    def __init__(self, args: tuple[Tensor, ...]) -> None:
        self.given = args


class Layers:
    """A model's decoder layers, and what transformers calls each of them with beside the hidden states."""

    def __init__(self, streamed: StreamedModel) -> None:
        self.model = streamed.model
        self.modules = decoder_layers(streamed.model)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {})] * len(self.modules)

    @torch.inference_mode()
    def embed(self, ids: Int64) -> Float32:
        """Return the hidden states [S, hidden_size] that one sequence [S] enters the first layer with.

        The calls of all layers are kept: other sequences of the same length are run with them.
        """
        entered: list[Tensor] = []

        def pass_on(number: int, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
            self._calls[number] = (args, named)
            if number == 0:
                entered.append(hidden_states)
            return hidden_states

        for number, layer in enumerate(self.modules):
            layer.forward = partial(pass_on, number)
        try:
            self.model.get_submodule("model")(torch.from_numpy(ids[None].copy()), use_cache=False)
        finally:
            for layer in self.modules:
                del layer.forward
        states: Float32 = entered[0][0].numpy()
        return states

    @torch.inference_mode()
    def groups(self, number: int, hidden: Float32) -> tuple[Group, ...]:
        """Run a layer on one sequence's hidden states [S, hidden_size] and see which products read the same input.

        Not a mixture's experts, which read some of the tokens each.
        """
        layer = self.modules[number]
        ran: list[tuple[str, Tensor, Tensor]] = []
        results: dict[str, Any] = {}

        def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            results[name] = output
            if isinstance(module, nn.Linear) and ".experts." not in name:
                ran.append((name, args[0], output))

        hooks = [
            module.register_forward_hook(partial(note, name)) for name, module in layer.named_modules() if name != ""
        ]
        try:
            self.run(number, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        parts: list[list[tuple[str, Tensor, Tensor]]] = []
        for entry in ran:
            if parts and parts[-1][0][1] is entry[1]:
                parts[-1].append(entry)
            else:
                parts.append([entry])
        return tuple(_group(part, layer, results) for part in parts)

    @torch.inference_mode()
    def run(self, number: int, hidden: Float32) -> Float32:
        """Run a layer on one sequence: [S, hidden_size] to [S, hidden_size]."""
        args, named = self._calls[number]
        result = self.modules[number](torch.from_numpy(np.array(hidden[None])), *args, **named)
        states: Float32 = (result[0] if isinstance(result, tuple) else result)[0].numpy()
        return states

    @torch.inference_mode()
    def final_norm(self, hidden: Float32) -> Tensor:
        """Return what the vocabulary projection reads: [S, hidden_size] to the same."""
        normed: Tensor = self.model.get_submodule("model.norm")(torch.from_numpy(np.array(hidden)))
        return normed


class LayerRun:
    """One layer over all sequences, group by group."""

    def __init__(
        self, layers: Layers, number: int, hidden: Float32, keep: Callable[[str, tuple[int, ...]], Float32]
    ) -> None:
        """Prepare.

        Args:
            hidden: [sequences, S, hidden_size], what the layer starts from.
            keep: makes an array of a name and a shape for activations that are kept while the layer runs.
        """
        self._layers, self._number, self._hidden, self._keep = layers, number, hidden, keep
        self._layer = layers.modules[number]
        self._sequence = 0
        self._replaced: list[nn.Module] = []
        self._kept: dict[Group, Float32] = {}

    def inputs(self, group: Group) -> Iterator[Tensor]:
        """Yield what a group's products read, [S, in] for each sequence, with all weights as they are now.

        To be gone through to the end, and for the groups in their order.
        """
        for number in self._sequences():
            (value,) = self._reach(group.products[0])
            value = value.reshape(-1, value.shape[-1])
            if group.closes is not None:
                if group not in self._kept:
                    self._kept[group] = self._keep(group.products[0], (len(self._hidden), *value.shape))
                self._kept[group][number] = value.numpy()
            yield value
        if group in self._kept:
            self._start_from(group, self._kept[group])

    def calls(self, module: str) -> Iterator[tuple[Tensor, ...]]:
        """Yield what one of the layer's modules is called with for each sequence, with all weights as they are now."""
        for _ in self._sequences():
            yield self._reach(module)

    def divide(self, group: Group, factors: Float32) -> None:
        """Divide the channels of a group's inputs by factors [in] where they are kept, as what they come from was divided."""
        if group in self._kept:
            for number in range(len(self._hidden)):
                self._kept[group][number] /= factors

    def outputs(self) -> Iterator[Float32]:
        """Yield the layer's result [S, hidden_size] for each sequence."""
        for number in self._sequences():
            yield self._layers.run(self._number, self._hidden[number])

    def close(self) -> None:
        """Give all modules their own code back."""
        for module in self._replaced:
            del module.forward
        self._replaced.clear()

    def _sequences(self) -> Iterator[int]:
        """Yield the sequences' numbers; what runs meanwhile takes the activations that were kept of that sequence."""
        for number in range(len(self._hidden)):
            self._sequence = number
            yield number

    @torch.inference_mode()
    def _reach(self, module: str) -> tuple[Tensor, ...]:
        with _stopping_at(self._layer.get_submodule(module)):
            try:
                self._layers.run(self._number, self._hidden[self._sequence])
            except _Reached as reached:
                return reached.given
        raise AssertionError(f"{module}: the layer did not run it")

    def _start_from(self, group: Group, kept: Float32) -> None:
        assert group.closes is not None
        product, closes = self._layer.get_submodule(group.products[0]), self._layer.get_submodule(group.closes)

        def forward(*_: Any, **__: Any) -> Any:
            result = product(torch.from_numpy(np.array(kept[self._sequence][None])))
            return (result, *[None] * (group.in_tuple - 1)) if group.in_tuple else result

        closes.forward = forward
        self._replaced.append(closes)


@contextmanager
def _stopping_at(module: nn.Module) -> Iterator[None]:
    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args)

    # Before the hook that reads the module's weight, which nothing would let go of again.
    hook = module.register_forward_pre_hook(stop, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def _group(part: list[tuple[str, Tensor, Tensor]], layer: nn.Module, results: dict[str, Any]) -> Group:
    products = tuple(name for name, _, _ in part)
    read, result = part[0][1], part[-1][2]
    norms = [
        name
        for name, output in results.items()
        if output is read and not isinstance(layer.get_submodule(name), nn.Linear)
    ]
    closes, in_tuple = products[-1].rpartition(".")[0], 0
    output = results.get(closes)
    if isinstance(output, tuple):
        output, in_tuple = output[0], len(output)
    alone = len(part) == 1 and not norms and closes and output is result
    return Group(products, norms[0] if norms else None, closes if alone else None, in_tuple if alone else 0)
