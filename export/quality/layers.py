"""Where in a model the rounding of weights does harm: the error of each decoder layer's output."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from galerne.export.parity.streamed import StreamedModel
from galerne.export.quality.bundle_weights import BundleWeights
from galerne.export.quality.distance import Int64


@dataclass(frozen=True)
class LayerError:
    """One decoder layer's relative error: the Frobenius norm of the difference over that of the source's output.

    added: with the source's own hidden states as the layer's input, so that only its own weights count.
    total: with what all earlier layers made of theirs.
    """

    layer: int
    added: float
    total: float


@torch.inference_mode()
def layer_errors(streamed: StreamedModel, weights: BundleWeights, ids: Int64) -> tuple[LayerError, ...]:
    """Run one sequence in transformers with the source's weights and with the bundle's, and compare layer by layer.

    Args:
        ids: [S] int64.
    """
    tokens = torch.from_numpy(ids[None].copy())
    layers = decoder_layers(streamed.model)
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(partial(_keep, inputs, outputs), with_kwargs=True) for layer in layers]
    try:
        streamed.model(tokens, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    shapes = {
        name: tuple(parameter.shape) for name, parameter in streamed.model.named_parameters(remove_duplicate=False)
    }
    streamed.substitute = lambda name: weights.parameter(name, shapes)
    hidden, found = None, []
    try:
        for number, layer in enumerate(layers):
            (first, *rest), named = inputs[number]
            added = _first(layer(first, *rest, **named))
            hidden = added if number == 0 else _first(layer(hidden, *rest, **named))
            found.append(LayerError(number, _relative(added, outputs[number]), _relative(hidden, outputs[number])))
    finally:
        streamed.substitute = None
    return tuple(found)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a model of transformers, in their order."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def _keep(
    inputs: list[Any],
    outputs: list[Tensor],
    layer: nn.Module,
    args: tuple[Any, ...],
    named: dict[str, Any],
    output: Any,
) -> None:
    if not args:  # transformers gives the hidden states by name in some families
        named = dict(named)
        args = (named.pop("hidden_states"),)
    inputs.append((args, named))
    outputs.append(_first(output))


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm()) / max(float(expected.norm()), 1e-30)
