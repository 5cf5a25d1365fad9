"""transformers' own model with its weights left on disk: a weight is in memory while the module that holds it runs.

The model is built on the meta device, and each module that owns weights reads them before its forward and drops them after it.
So everything that runs is transformers' code: masks, rotation, the layers' kinds, scalings.
"""

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import eager_mask

from galerne.errors import InputError, one_line
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.composed import adapter_products, round_input, rounded_cache
from galerne.export.parity.composed import rounded_inputs as read_rounded_inputs
from galerne.export.parity.rounded_experts import experts_apart, with_rounded_inputs
from galerne.export.parity.rounding import rounded_like
from galerne.export.parity.stored_weights import (
    Held,
    StoredWeights,
    loaded_weights,
    open_weights,
    part_of_product,
    quiet,
)
from galerne.optimize.quantize.recipe import AnyRecipe
from galerne.parallel import ordered

# A model whose weights take no more than this in float32 keeps them once they are read.
_KEEP_BYTES = 2 << 30
# Weights that one core reads, widens and rounds at once.
_STRIPE = 1 << 20
# Eager attention holds heads x new tokens x keys scores at once, several times over: 256 MB each in float32.
_MOST_SCORES = 64 << 20
_ATTENTION = "galerne_blocked_eager"
# What an attention module passes its keys and values through, where it has this: both [B, Hkv, S, D], rotated.
CACHED = "galerne_cached"


class StreamedModel:
    """A checkpoint in its architecture's own class of transformers, in float32 with eager attention.

    The weights are read by the safetensors library (by transformers itself from GGUF, or where a checkpoint's names are not those
    of transformers' class; it then holds them all), and never by Galerne.

    model: what to call. rounding: the recipe that weights are rounded by; None takes them as they are.
    substitute: gives other weights in place of the checkpoint's by a parameter's name, or None where it has none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Path | None = None,
        *,
        substitute: Callable[[str], Tensor | None] | None = None,
        rounded_inputs: bool = True,
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Open a checkpoint.

        Args:
            adapter: the folder of a LoRA adapter whose products are added to the rounded weights; those of an
                `AdaptedCheckpoint` are there before the rounding.
            substitute: gives every weight from the start, so that the checkpoint's files are not opened here and none is kept.
            rounded_inputs: round the inputs of layers, keys and values where the checkpoint says so.
            prepare: changes the model's modules on the meta device before anything runs.
        Raises: InputError if transformers cannot load it.
        """
        self._products = {} if adapter is None else adapter_products(adapter)
        self._weights: StoredWeights = Held({})
        try:
            with quiet():
                if substitute is None:
                    self._weights, config = open_weights(checkpoint)
                else:
                    config = AutoConfig.for_model(**checkpoint.config)
                with torch.device("meta"):
                    self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                        config, dtype=torch.float32, attn_implementation=_ATTENTION, experts_implementation="eager"
                    )
                if prepare is not None:
                    prepare(self.model)
                names = {self._stored(name) for name, _ in self.model.named_parameters(remove_duplicate=False)}
                if substitute is None and not names <= self._weights.names():
                    self._weights = loaded_weights(checkpoint)
                self._fill_buffers()
            self._round_inputs(read_rounded_inputs(checkpoint) if rounded_inputs else {})
            self._round_cache(rounded_cache(checkpoint) if rounded_inputs else {})
        except Exception as exc:
            raise InputError(f"{checkpoint.path}: transformers cannot load it ({one_line(exc)})") from exc
        self.model.eval()
        self._rounding: AnyRecipe | None = None
        self._substitute = substitute
        self._kept: dict[str, nn.Parameter] = {}
        size = sum(4 * math.prod(parameter.shape) for parameter in self.model.parameters())
        self._keep = substitute is None and size <= _KEEP_BYTES
        for path, module in self.model.named_modules():
            if any(parameter is not None for parameter in module._parameters.values()):
                module.register_forward_pre_hook(partial(self._read_into, path))
                module.register_forward_hook(partial(_drop, dict(module._parameters)))

    @property
    def rounding(self) -> AnyRecipe | None:
        """The recipe that weights are rounded by."""
        return self._rounding

    @rounding.setter
    def rounding(self, recipe: AnyRecipe | None) -> None:
        self._rounding = recipe
        self._kept.clear()

    @property
    def substitute(self) -> Callable[[str], Tensor | None] | None:
        """What gives other weights in place of the checkpoint's."""
        return self._substitute

    @substitute.setter
    def substitute(self, other: Callable[[str], Tensor | None] | None) -> None:
        self._substitute = other
        self._kept.clear()

    def weight(self, name: str) -> Tensor:
        """Return a parameter as the model computes with it: float32, rounded. A tied projection has its own name."""
        if self._substitute is not None and (other := self._substitute(name)) is not None:
            return other
        stored = self._stored(name)
        shape = tuple(self.model.get_parameter(name).shape)
        if self._weights.shape(stored) != shape:
            raise InputError(f"{stored}: shape {list(self._weights.shape(stored))}; transformers expects {list(shape)}")
        whole = np.empty(shape, np.float32)
        step = max(1, _STRIPE // max(1, math.prod(shape[1:])))

        def fill(first: int) -> None:
            rows = self._weights.rows(stored, first, min(first + step, shape[0])).float()
            if self._rounding is not None:
                rows = rounded_like(rows, name, self._rounding, first)
            if name in self._products and _owner(name) not in self._rounded:
                rows = rows + part_of_product(self._products[name], first, first + step)
            whole[first : first + step] = rows.numpy()

        for _ in ordered(partial(fill, first) for first in range(0, shape[0], step)):
            pass
        return torch.from_numpy(whole)

    def _stored(self, name: str) -> str:
        """Return the name that a parameter is stored under: that of the table where the two are tied."""
        head, table = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if name not in self._weights.names() and head is not None and self.model.get_submodule(_owner(name)) is head:
            return next(f"{path}.weight" for path, module in self.model.named_modules() if module is table)
        return name

    def _read_into(self, path: str, module: nn.Module, _: Any) -> None:
        for kind, place in module._parameters.items():
            if place is None:  # a product without a bias
                continue
            name = f"{path}.{kind}"
            parameter = self._kept.get(name)
            if parameter is None:
                parameter = nn.Parameter(self.weight(name), requires_grad=False)
                if self._keep:
                    self._kept[name] = parameter
            module._parameters[kind] = parameter

    def _round_inputs(self, rounded: Mapping[str, tuple[str, float]]) -> None:
        """Have layers round their inputs; an adapter's product takes them as they were."""
        self._rounded = set(rounded)
        plain, mixtures = experts_apart(rounded)
        for path, roundings in mixtures.items():
            experts = self.model.get_submodule(path)
            experts.forward = with_rounded_inputs(experts, roundings)
        for path, (kind, scale) in plain.items():
            layer = self.model.get_submodule(path)
            assert isinstance(layer, nn.Linear), path
            layer.forward = partial(_of_rounded, layer, kind, scale, self._products.get(f"{path}.weight"))  # type: ignore[method-assign]

    def _round_cache(self, rounded: Mapping[str, tuple[str, float]]) -> None:
        """Have attention read keys and values as a cache of 8 bits holds them."""
        for path in sorted({name.rpartition(".")[0] for name in rounded}):
            key, value = rounded[f"{path}.k"], rounded[f"{path}.v"]
            setattr(self.model.get_submodule(path), CACHED, partial(_of_cache, key, value))

    def _fill_buffers(self) -> None:
        """Compute what no checkpoint holds, such as the rotary frequencies, as transformers does when it loads one."""
        for path, module in self.model.named_modules():
            if not module._buffers:
                continue
            for kind, buffer in module._buffers.items():
                assert buffer is not None
                module._buffers[kind] = torch.full(buffer.shape, math.nan, dtype=buffer.dtype, device="cpu")
            self.model._init_weights(module)
            for kind, buffer in module._buffers.items():
                if not torch.isfinite(buffer).all():
                    raise ValueError(f"{path}.{kind}: no value for this buffer")


def source_window(checkpoint: Checkpoint) -> int | None:
    """Return the window of a checkpoint's layers as transformers reads its config, and not as Galerne does; None for none.

    Raises: InputError if transformers cannot read the config.
    """
    try:
        with quiet():
            config = AutoConfig.for_model(**{"model_type": "", **checkpoint.config})
    except Exception as exc:
        raise InputError(f"{checkpoint.path}: transformers cannot read its config ({one_line(exc)})") from exc
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window: int | None = getattr(config, "sliding_window", None)
    return window if "sliding_attention" in kinds else None


def _of_rounded(
    layer: nn.Linear, kind: str, scale: float, product: tuple[float, Tensor, Tensor] | None, x: Tensor
) -> Tensor:
    y = nn.functional.linear(round_input(x, kind, scale), layer.weight, layer.bias)
    if product is not None:
        factor, b, a = product
        y = y + factor * (x @ a.t()) @ b.t()
    return y


def _of_cache(key: tuple[str, float], value: tuple[str, float], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return round_input(keys, *key), round_input(values, *value)


def _drop(parameters: dict[str, nn.Parameter | None], module: nn.Module, *_: Any) -> None:
    module._parameters.update(parameters)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _blocked_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Call the eager attention of the module's own family on some queries [B, H, S, D] at a time, which changes no result."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if (cached := getattr(module, CACHED, None)) is not None:
        key, value = cached(key, value)
    rows = max(16, _MOST_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    parts = []
    for first in range(0, query.shape[2], rows):
        block = slice(first, first + rows)
        mask = None if attention_mask is None else attention_mask[:, :, block]
        parts.append(eager(module, query[:, :, block], key, value, mask, **kwargs)[0])
    return torch.cat(parts, dim=1), None


AttentionInterface.register(_ATTENTION, _blocked_eager)
AttentionMaskInterface.register(_ATTENTION, eager_mask)
