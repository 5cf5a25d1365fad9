"""Checkpoints that were quantized before, in the layouts of the libraries that write them.

compressed-tensors packs its own. autoawq needs packages that nobody maintains, and gptqmodel a newer torch than ours, so AWQ and
GPTQ are packed here, from the formats' descriptions; quantized/test_weights.py has other libraries read them.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.prequantized import choose_recipe
from galerne.runtime.bundle import Bundle


@dataclass
class Rounded:
    """A weight after rounding: row r of `codes` [in, out] is (codes[r] - zeros[groups[r]]) * scales[groups[r]]."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor

    def dequantized(self) -> Tensor:
        """Return [out, in] float32."""
        return ((self.codes - self.zeros[self.groups]) * self.scales.float()[self.groups]).t().contiguous()


def round_weight(
    weight: Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool,
    groups: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Rounded:
    """Round [out, in] to nearest in groups along `in`; `groups` says which feature belongs to which."""
    rows = weight.t().float()  # [in, out]
    if groups is None:
        groups = torch.arange(len(rows)) // group
    most = (1 << bits) - 1
    scales, zeros = [], []
    for number in range(int(groups.max()) + 1):
        own = rows[groups == number]
        if symmetric:
            scale = own.abs().amax(0).clamp(min=1e-6) / ((most - 1) // 2)
            zero = torch.full_like(scale, (most + 1) // 2)
        else:
            low, high = own.amin(0).clamp(max=0), own.amax(0).clamp(min=0)
            scale = ((high - low) / most).clamp(min=1e-6)
            zero = (-low / scale).round().clamp(1, most)
        scales.append(scale.to(dtype))
        zeros.append(zero.int())
    stacked = torch.stack(scales)
    zero_points = torch.stack(zeros)
    codes = (rows / stacked.float()[groups] + zero_points[groups]).round().clamp(0, most).int()
    return Rounded(codes, zero_points, stacked, groups)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack [n, m] into [n, m * bits / 32] int32 along the last axis, the first in the low bits."""
    each = 32 // bits
    fields = values.long().reshape(len(values), -1, each) << torch.arange(0, 32, bits)
    return fields.sum(-1).to(torch.int32)


def awq_tensors(rounded: Rounded) -> dict[str, Tensor]:
    """Pack as autoawq's WQLinear_GEMM does: nibble i of an int32 holds output channel (0, 2, 4, 6, 1, 3, 5, 7)[i] of eight."""

    def interleaved(values: Tensor) -> Tensor:
        return pack(values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    return {"qweight": interleaved(rounded.codes), "qzeros": interleaved(rounded.zeros), "scales": rounded.scales}


def gptq_tensors(rounded: Rounded, bits: int, version: int, *, g_idx: bool = True) -> dict[str, Tensor]:
    """Pack as auto-gptq's QuantLinear does: along the input axis, zero points less one in version 1 of the format."""
    tensors = {
        "qweight": pack(rounded.codes.t().contiguous(), bits).t().contiguous(),
        "qzeros": pack(rounded.zeros - (1 if version == 1 else 0), bits),
        "scales": rounded.scales,
    }
    return tensors | ({"g_idx": rounded.groups.to(torch.int32)} if g_idx else {})


@dataclass
class Quantized:
    """A folder in a quantized layout, and what its weights are, dequantized, [out, in] float32."""

    folder: Path
    weights: dict[str, Tensor] = field(default_factory=dict)


def rewrite(
    source: Path,
    folder: Path,
    config: Mapping[str, Any],
    layout: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor] | None],
) -> Quantized:
    """Copy a checkpoint and put what `layout` makes of a layer's linear weight in that weight's place.

    layout: called with the weight's name and [out, in]; returns its tensors by part and the dequantized weight, or None.
    """
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    made = Quantized(folder)
    for name in [name for name in tensors if name.endswith("_proj.weight") or name == "lm_head.weight"]:
        parts = layout(name, tensors[name])
        if parts is not None:
            del tensors[name]
            tensors |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts[0].items()}
            made.weights[name] = parts[1]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, "quantization_config": dict(config)}))
    return made


def desc_act_groups(in_features: int, group: int, seed: int) -> Tensor:
    """Return which group each input feature is in when they were quantized in another order than they stand."""
    order = torch.randperm(in_features, generator=torch.Generator().manual_seed(seed))
    groups = torch.empty(in_features, dtype=torch.long)
    groups[order] = torch.arange(in_features) // group
    return groups


@pytest.fixture(scope="session")
def exported() -> Callable[[Path, Path], Bundle]:
    """Return a function that exports a folder as it was quantized."""

    def run(folder: Path, out: Path) -> Bundle:
        checkpoint = open_checkpoint(folder)
        return export(checkpoint, choose_recipe(checkpoint, None, None), out, chunk=8)

    return run


Maker = Callable[..., Quantized]


@pytest.fixture(scope="session")
def make_awq(checkpoint_folder: Path) -> Maker:
    """Write the shared Mistral, or another checkpoint, as autoawq does."""

    def make(folder: Path, *, group: int = 32, source: Path | None = None, **config: Any) -> Quantized:
        def layout(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
            if name == "lm_head.weight":
                return None
            rounded = round_weight(weight, 4, group, symmetric=False)
            return awq_tensors(rounded), rounded.dequantized()

        settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        return rewrite(source or checkpoint_folder, folder, settings | config, layout)

    return make


@pytest.fixture(scope="session")
def make_gptq(checkpoint_folder: Path) -> Maker:
    """Write the shared Mistral as gptqmodel does.

    desc_act: "shared" where the projections that read one input share its order, "own" where each has its own.
    """

    def make(
        folder: Path,
        *,
        bits: int = 4,
        group: int = 32,
        symmetric: bool = True,
        version: int = 1,
        desc_act: str | None = None,
        **config: Any,
    ) -> Quantized:
        def layout(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
            if name == "lm_head.weight":
                return None
            each, groups = (weight.shape[1] if group == -1 else group), None
            if desc_act is not None:
                groups = desc_act_groups(weight.shape[1], each, len(name) if desc_act == "own" else 7)
            if desc_act == "own" and ".k_proj" in name:
                groups = desc_act_groups(weight.shape[1], each, 99)
            rounded = round_weight(weight, bits, each, symmetric=symmetric, groups=groups)
            return gptq_tensors(rounded, bits, version), rounded.dequantized()

        settings = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": symmetric,
            "desc_act": desc_act is not None,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        }
        return rewrite(checkpoint_folder, folder, settings | config, layout)

    return make


# Schemes of compressed-tensors by a short name: the format and the arguments of the weights' quantization.
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4 groups asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int4 channels": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "int8 groups": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "int8 channels": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 channels asymmetric": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 channels": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
    ),
}


@pytest.fixture(scope="session")
def make_compressed(checkpoint_folder: Path) -> Maker:
    """Write the shared Mistral with compressed-tensors' own compressors; the weights are what they decompress to.

    dtype: of the scales, and so of what the library dequantizes.
    skip: modules that stay floats.
    """
    pytest.importorskip("compressed_tensors", reason="compressed-tensors, which packs the checkpoint, is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def make(
        folder: Path, scheme: str, *, dtype: torch.dtype = torch.float16, skip: str = "lm_head", **config: Any
    ) -> Quantized:
        form, arguments = SCHEMES[scheme]
        args = QuantizationArgs(**arguments)
        # Found as they come, so that no scale is stored; quantized/compressed.py has those that are.
        activations = (
            None
            if form == "pack-quantized"
            else QuantizationArgs(num_bits=8, type=arguments.get("type", "int"), strategy="token", dynamic=True)
        )
        plan = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations)
        compressor = BaseCompressor.get_value_from_registry(form)

        def layout(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
            if skip in name:
                return None
            weight = weight.to(dtype)
            rows, columns = weight.shape
            low, high = {
                "tensor": lambda: (weight.min().reshape(1), weight.max().reshape(1)),
                "channel": lambda: (weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)),
                "group": lambda: (
                    weight.reshape(rows, -1, args.group_size or 1).amin(-1),
                    weight.reshape(rows, -1, args.group_size or 1).amax(-1),
                ),
                "block": lambda: (
                    weight.reshape(rows // 32, 32, columns // 32, 32).amin((1, 3)),
                    weight.reshape(rows // 32, 32, columns // 32, 32).amax((1, 3)),
                ),
            }[args.strategy.value if hasattr(args.strategy, "value") else str(args.strategy)]()
            scale, zero = calculate_qparams(low, high, args)
            state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
            packed = compressor.compress(state, plan)
            return packed, compressor.decompress(packed, plan)["weight"].float()

        group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None}
        if activations is not None:
            group["input_activations"] = activations.model_dump(mode="json")
        settings = {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [skip],
        }
        return rewrite(checkpoint_folder, folder, settings | config, layout)

    return make
