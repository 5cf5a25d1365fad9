"""How much the rounding of some weights alone harms a model's answers, for all of them in one pass forward and one back.

Let rounding change an output of a part of the model by d at each position, and let g be the gradient, by that output, of the log
likelihood of tokens that are drawn from the model's own distribution. To second order the divergence of the answers is half the
mean of the square of the sum of g . d, by the Fisher information of the answers. The sum runs over the positions of a sequence;
what they add is taken as independent of each other, since the tokens are drawn so, which leaves a mean over positions with little
noise. Of queries, keys and values that does not hold, as attention mixes the positions: their d is that of attention's output.

So the cost grows with the number of layers, where measuring the divergence itself, weight by weight, grows with its square.

Source: the expansion and its use for choosing bits, HAWQ-V2 (Dong et al. 2020, arXiv 1911.03852); the Fisher information for it,
SqueezeLLM (Kim et al. 2024, arXiv 2306.07629).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from galerne.export.parity.rounding import expert_names, rounded_like
from galerne.export.parity.streamed import StreamedModel
from galerne.export.quality.distance import Int64
from galerne.export.quality.layers import decoder_layers
from galerne.export.sensitivity.groups import Group
from galerne.optimize.quantize.recipe import Recipe, WeightFormat
from galerne.progress import Task

# Logits of one pass, which reads all weights twice where they are more than the reference may hold.
_MOST_LOGITS = 32 << 20
# Positions whose outputs are computed again at once: the vocabulary's are many.
_ROWS = 256
Harms = dict[str, dict[WeightFormat, float]]


def measure_harms(
    streamed: StreamedModel, recipe: Recipe, groups: Sequence[Group], formats: Sequence[WeightFormat], ids: Int64
) -> Harms:
    """Return for each group of weights and each format how much its rounding alone adds to KL(source, rounded).

    Args:
        streamed: the source.
        recipe: how weights are rounded; its own formats do not count.
        groups: of the source's weights.
        formats: what weights may be rounded to.
        ids: [sequences, S] int64.
    Returns: nats, the mean over positions, by the group's pattern; without the formats that a group does not take.
    """
    streamed.rounding = None
    together = max(1, _MOST_LOGITS // (ids.shape[1] * streamed.model.config.vocab_size))
    passes = range(0, len(ids), together)
    layers = decoder_layers(streamed.model)
    drawn = torch.Generator().manual_seed(0)
    counted = _Counted(recipe, groups, formats, ids.size)
    with Task("sensitivity", len(passes) * (len(layers) + 1)) as task, _Watched(streamed.model, counted) as watched:
        for first in passes:
            tokens = torch.from_numpy(ids[first : first + together].copy())
            inputs, gradient = _to_the_end(streamed.model, layers, tokens, drawn)
            task.advance()
            for layer in reversed(layers):
                gradient = _through(layer, *inputs.pop(), gradient)
                watched.run_attention_again()
                task.advance()
    return counted.harms


class _Counted:
    """Adds up the harms of groups of weights."""

    def __init__(
        self, recipe: Recipe, groups: Sequence[Group], formats: Sequence[WeightFormat], positions: int
    ) -> None:
        # Rounded by itself, whatever its name, so as every other.
        self._rounded = {form: replace(recipe, weights=form, lm_head=form, overrides=()) for form in formats}
        self._group_of = {name: group for group in groups for name in group.names}
        self._positions = positions
        self.harms: Harms = {group.match: dict.fromkeys(group.formats(formats), 0.0) for group in groups}

    def formats(self, name: str) -> Iterable[WeightFormat]:
        """Return the formats that count for a weight; none for one of no group, as a router."""
        group = self._group_of.get(name)
        return () if group is None else self.harms[group.match]

    def in_attention(self, name: str) -> bool:
        """Whether a weight gives queries, keys or values."""
        group = self._group_of.get(name)
        return group is not None and group.in_attention

    def rounded(self, weight: Tensor, names: tuple[str, ...], form: WeightFormat) -> Tensor:
        """Return a weight [out, in], whose parts of one size have these names, rounded."""
        parts = zip(weight.split(len(weight) // len(names)), names, strict=True)
        return torch.cat([rounded_like(part, name, self._rounded[form]) for part, name in parts])

    def add(self, name: str, form: WeightFormat, slopes: Tensor, change: Tensor) -> None:
        """Count what a change of an output [tokens, out] does, given the gradient by that output."""
        moved = (slopes * change).sum(dim=-1)
        self.harms[self._group_of[name].match][form] += float(moved.square().sum()) / (2 * self._positions)


Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


def _to_the_end(
    model: nn.Module, layers: list[nn.Module], tokens: Tensor, drawn: torch.Generator
) -> tuple[list[Call], Tensor]:
    """Run all of a model, and what follows its last layer backwards.

    Returns: each layer's input, and the gradient of the drawn tokens' log likelihood by the last layer's output.
    """
    inputs: list[Call] = []
    last: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        if not args:  # transformers gives the hidden states by name in some families
            named = dict(named)
            args = (named.pop("hidden_states"),)
        inputs.append((args[0], args[1:], named))
        if layer is not layers[-1]:
            return output
        # From here on gradients are wanted; before it nothing asks for one, so nothing is kept for them.
        last.append(_first(output).detach().requires_grad_())
        return (last[0], *output[1:]) if isinstance(output, tuple) else last[0]

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    try:
        with torch.enable_grad():
            logits = model(tokens, use_cache=False).logits.float()
            likely = torch.softmax(logits.detach(), dim=-1)
            chosen = torch.multinomial(likely.flatten(0, -2), 1, generator=drawn).reshape(*tokens.shape, 1)
            logits.backward(likely.scatter_add_(-1, chosen, torch.full(chosen.shape, -1.0)))
    finally:
        for hook in hooks:
            hook.remove()
    assert last[0].grad is not None
    return inputs, last[0].grad


def _through(
    layer: nn.Module, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any], gradient: Tensor
) -> Tensor:
    """Run a layer forward and back; return the gradient by its input."""
    given = hidden.detach().requires_grad_()
    with torch.enable_grad():
        _first(layer(given, *rest, **named)).backward(gradient)
    assert given.grad is not None
    return given.grad


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@dataclass
class _Attention:
    """A call of a layer's attention, and the gradient by its output once that is there."""

    module: nn.Module
    args: tuple[Any, ...]
    named: dict[str, Any]
    output: Tensor
    names: list[str]
    gradient: Tensor | None = None


class _Watched(TorchFunctionMode):
    """Counts what the products of a model would change if their weights were rounded, as their gradients come by."""

    def __init__(self, model: nn.Module, counted: _Counted) -> None:
        super().__init__()
        self._model, self._counted = model, counted
        self._names: dict[int, tuple[str, ...]] = {}
        self._hooks: list[Any] = []
        self._attention: list[_Attention] = []
        self._used: list[str] = []
        self._rounding: WeightFormat | None = None

    def __enter__(self) -> "_Watched":
        for path, module in self._model.named_modules():
            if any(parameter is not None for parameter in module._parameters.values()):
                # After the hook that reads the weights, as it was registered later.
                self._hooks.append(module.register_forward_pre_hook(partial(self._name, path)))
            if path.endswith(".self_attn"):
                self._hooks.append(module.register_forward_pre_hook(lambda *_: self._used.clear()))
                self._hooks.append(module.register_forward_hook(self._keep_attention, with_kwargs=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear:
            return func(*args, **(kwargs or {}))
        given, weight, *rest = args
        names = self._names.get(weight.data_ptr(), ())
        if any(map(self._counted.in_attention, names)):
            self._used += names
            if self._rounding is not None:
                weight = self._counted.rounded(weight, names, self._rounding)
            return func(given, weight, *rest, **(kwargs or {}))
        output = func(given, weight, *rest, **(kwargs or {}))
        if names and output.requires_grad:
            output.register_hook(partial(self._count, names, weight.detach(), given.detach().flatten(0, -2)))
        return output

    @torch.no_grad()
    def run_attention_again(self) -> None:
        """Count what rounded queries, keys and values change of the output of attention that was run forward and back."""
        for call in self._attention:
            assert call.gradient is not None
            for form in list(self._counted.formats(call.names[0])):
                self._rounding = form
                again = _first(call.module(*call.args, **call.named))
                self._rounding = None
                self._counted.add(
                    call.names[0], form, call.gradient.flatten(0, -2), (again - call.output).flatten(0, -2)
                )
        self._attention.clear()

    def _keep_attention(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        result = _first(output)
        if not result.requires_grad:
            return
        call = _Attention(module, args, named, result.detach(), list(self._used))
        result.register_hook(partial(setattr, call, "gradient"))
        self._attention.append(call)

    @torch.no_grad()
    def _count(self, names: tuple[str, ...], weight: Tensor, given: Tensor, gradient: Tensor) -> None:
        """Count what rounding a weight [out, in] does to its output, for inputs [tokens, in] and gradients [..., out]."""
        height = len(weight) // len(names)
        for name, part, slopes in zip(names, weight.split(height), gradient.split(height, dim=-1), strict=True):
            for form in self._counted.formats(name):
                change = (self._counted.rounded(part, (name,), form) - part).t()
                for rows, own in zip(given.split(_ROWS), slopes.flatten(0, -2).split(_ROWS), strict=True):
                    self._counted.add(name, form, own, rows @ change)

    def _name(self, path: str, module: nn.Module, _: Any) -> None:
        for kind, parameter in module._parameters.items():
            if parameter is None or parameter.ndim < 2:
                continue
            if parameter.ndim == 2:
                self._names[parameter.data_ptr()] = (f"{path}.{kind}",)
                continue
            for number, expert in enumerate(parameter):
                self._names[expert.data_ptr()] = expert_names(f"{path}.{kind}", number)
