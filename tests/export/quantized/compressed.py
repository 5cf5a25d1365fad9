"""Checkpoints whose inputs are rounded too, made whole by compressed-tensors, and what that library computes with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

# A group of config.json by a short name: the arguments of the weights and of the inputs.
_STATIC = {"num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "int8": {"weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": {**_STATIC, "type": "int"}},
    "float8": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {**_STATIC, "type": "float"},
    },
    "int8 dynamic": {
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
    },
    "int8 asymmetric": {
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {**_STATIC, "symmetric": False},
    },
    "int4": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
    "int8 weights": {"weights": {"num_bits": 8, "strategy": "channel"}},
}
# Groups by their targets, for one checkpoint.
Plan = dict[str, str]


def quantize_checkpoint(
    source: Path,
    folder: Path,
    groups: Plan,
    *,
    ignore: str = "lm_head",
    wider_input: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Callable[[Tensor], Tensor]:
    """Round a checkpoint with compressed-tensors, calibrated on random tokens, and save it.

    Args:
        groups: the name of a group in `GROUPS` by its target, as in {"Linear": "int8"}.
        ignore: a layer, or a pattern after "re:", that stays as it is.
        wider_input: a layer whose input has a scale of its own; else layers that read one input share its scale.
        dtype: of the scales.
    Returns: what the library's own model computes: logits [B, S, V] float32 for ids [B, S].
    """
    pytest.importorskip("compressed_tensors", reason="compressed-tensors, which packs the checkpoint, is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ranges = _input_ranges(model)
    named = {f"group_{i}": {"targets": [target], **GROUPS[name]} for i, (target, name) in enumerate(groups.items())}
    apply_quantization_config(model, QuantizationConfig(config_groups=named, ignore=[ignore]), show_progress=False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme"):
            wider = 1.25 if name.endswith(wider_input) else 1.0
            _calibrate(module, ranges[name][0] * wider, ranges[name][1] * wider, dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.config.save_pretrained(folder)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    compressor.update_config(str(folder))
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):  # else the weights are dequantized to the scales' type
            parameter.data = parameter.data.float()

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(ids).logits
        return found

    return logits


@torch.no_grad()
def _input_ranges(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def see(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                ranges[name] = (args[0].min(), args[0].max())

            hooks.append(module.register_forward_pre_hook(see))
    model(torch.randint(0, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(3)))
    for hook in hooks:
        hook.remove()
    return ranges


def _calibrate(module: nn.Linear, low: Tensor, high: Tensor, dtype: torch.dtype) -> None:
    """Set a layer's scales, in the values that `dtype` holds."""
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme: Any = module.quantization_scheme
    weight, args = module.weight.detach(), scheme.weights
    rows = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
    scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), args)
    module.weight_scale.data = scale.to(dtype)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero
    inputs = scheme.input_activations
    if inputs is not None and inputs.dynamic is False:
        scale, zero = calculate_qparams(low, high, inputs)
        module.input_scale.data = scale.to(dtype)
        if hasattr(module, "input_zero_point"):
            module.input_zero_point.data = zero
