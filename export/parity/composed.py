"""The weights of checkpoints that transformers does not load by itself, for the reference.

Written from the formats' descriptions with torch, and on purpose not with the code that exports: a layout read wrongly there
must not be read wrongly here too.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.consolidated import ConsolidatedCheckpoint
from galerne.export.checkpoint.quantized_folder import QuantizedCheckpoint


def composed_weights(checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """Return all weights by Hugging Face's names, [out, in], float32 where they had to be computed.

    Returns: None where transformers loads the checkpoint by itself.
    """
    if isinstance(checkpoint, QuantizedCheckpoint):
        dequantized = _dequantized(_stored(checkpoint.files()), dict(checkpoint.quantization_config))
        return _with_experts_together(dequantized)
    if isinstance(checkpoint, ConsolidatedCheckpoint):
        return _from_native(_stored(checkpoint.files()), checkpoint.config)
    return None


def rounded_inputs(checkpoint: Checkpoint) -> dict[str, tuple[str, float]]:
    """Return what the inputs of layers are rounded to: "int" or "float", of 8 bits, and the scale, by the layer's name."""
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return {}
    config = dict(checkpoint.quantization_config)
    if config["quant_method"] != "compressed-tensors":
        return {}
    found = {}
    for name, scale in _stored(checkpoint.files(), ".input_scale").items():
        module = name.rpartition(".")[0]
        args = _group_of(module, config).get("input_activations") or {"dynamic": True}
        if not args.get("dynamic") and (args.get("strategy") or "tensor") == "tensor" and args.get("symmetric", True):
            found[module] = (args.get("type", "int"), scale.float().item())
    return found


def rounded_cache(checkpoint: Checkpoint) -> dict[str, tuple[str, float]]:
    """Return what keys and values are rounded to, as `rounded_inputs` does, by their scale's name without "_scale"."""
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return {}
    args = checkpoint.quantization_config.get("kv_cache_scheme") or {"dynamic": True}
    if args.get("dynamic") or (args.get("strategy") or "tensor") != "tensor" or not args.get("symmetric", True):
        return {}
    if (args.get("type", "int"), args.get("num_bits", 8)) != ("int", 8):
        return {}
    return {
        name.removesuffix("_scale"): ("int", scale.float().item())
        for part in ("k", "v")
        for name, scale in _stored(checkpoint.files(), f".self_attn.{part}_scale").items()
    }


def _group_of(module: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the group of a layer: one that names it, or else one with a pattern for it, or else one for all layers."""
    ranked = []
    for group in config["config_groups"].values():
        for target in group["targets"]:
            if target == module:
                ranked.append((0, target, group))
            elif target.startswith("re:") and re.match(target.removeprefix("re:"), module):
                ranked.append((1, target, group))
            elif target == "Linear":
                ranked.append((2, target, group))
    return min(ranked, key=lambda each: each[:2])[2] if ranked else {}


def round_input(x: Tensor, kind: str, scale: float) -> Tensor:
    """Round to 8 bits with one scale and back, as compressed-tensors describes it; x and the result are float32."""
    if kind == "float":
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return (x / scale).round().clamp(-128, 127) * scale


def _from_native(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Rename Mistral's tensors and bring the rows of queries and keys into Hugging Face's order, row by row."""
    names = [
        *(("tok_embeddings", "model.embed_tokens"), ("output", "lm_head"), ("attention_norm", "input_layernorm")),
        *(
            ("ffn_norm", "post_attention_layernorm"),
            ("attention.wq", "self_attn.q_proj"),
            ("attention.wk", "self_attn.k_proj"),
        ),
        *(
            ("attention.wv", "self_attn.v_proj"),
            ("attention.wo", "self_attn.o_proj"),
            ("feed_forward.w1", "mlp.gate_proj"),
        ),
        *(("feed_forward.w2", "mlp.down_proj"), ("feed_forward.w3", "mlp.up_proj")),
    ]
    half = int(config["head_dim"]) // 2
    weights = {}
    for stored, tensor in tensors.items():
        name = f"model.{stored}" if stored.startswith(("layers.", "norm.")) else stored
        for own, other in names:
            name = name.replace(f"{own}.", f"{other}.")
        if stored.endswith((".wq.weight", ".wk.weight")):
            rows = [
                head * 2 * half + 2 * pair + side
                for head in range(len(tensor) // half // 2)
                for side in (0, 1)
                for pair in range(half)
            ]
            tensor = tensor[rows]
        weights[name] = tensor
    return weights


def _stored(files: list[Path], ending: str = "") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                names = [name for name in opened.keys() if name.endswith(ending)]  # noqa: SIM118 (it is no dict)
                tensors |= {name: opened.get_tensor(name) for name in names}
    return tensors


def _dequantized(tensors: dict[str, Tensor], config: dict[str, object]) -> dict[str, Tensor]:
    method = config["quant_method"]
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    weights = {}
    for module, own in modules.items():
        if "qweight" in own:
            weights[f"{module}.weight"] = _awq(own) if method == "awq" else _gptq(own, config)
        elif "weight_scale" in own:
            weights[f"{module}.weight"] = _compressed(own, config)
        elif "weight" in own:
            weights[f"{module}.weight"] = own["weight"]
        if "bias" in own:
            weights[f"{module}.bias"] = own["bias"]
    return weights


def _with_experts_together(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a mixture's experts side by side, as transformers' class has them: gate and up [experts, 2 x width, in], down."""
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    others = {}
    for name, tensor in weights.items():
        layer, _, own = name.partition(".block_sparse_moe.")
        if own == "gate.weight":
            others[f"{layer}.mlp.gate.weight"] = tensor
        elif own:
            _, number, part, _ = own.split(".")
            found.setdefault(layer, {}).setdefault(int(number), {})[part] = tensor.float()
        else:
            others[name] = tensor
    for layer, experts in found.items():
        each = [experts[number] for number in range(len(experts))]
        others[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat([own["w1"], own["w3"]]) for own in each])
        others[f"{layer}.mlp.experts.down_proj"] = torch.stack([own["w2"] for own in each])
    return others


def _fields(packed: Tensor, bits: int) -> Tensor:
    """[..., n] int32 to [..., n, 32 // bits], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)


def _awq(own: dict[str, Tensor]) -> Tensor:
    # The nibble that holds each of eight neighbouring output channels.
    places = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    codes = _fields(own["qweight"], 4)[..., places].flatten(1)
    zeros = _fields(own["qzeros"], 4)[..., places].flatten(1)
    group = torch.arange(len(codes)) // (len(codes) // len(zeros))
    return ((codes - zeros[group]) * own["scales"].float()[group]).t().contiguous()


def _gptq(own: dict[str, Tensor], config: dict[str, object]) -> Tensor:
    bits = int(str(config["bits"]))
    codes = _fields(own["qweight"], bits).transpose(1, 2).flatten(0, 1)
    first_version = (config.get("checkpoint_format") or config.get("format") or "gptq") == "gptq"
    zeros = _fields(own["qzeros"], bits).flatten(1)[:, : codes.shape[1]] + int(first_version)
    group = own.get("g_idx", torch.arange(len(codes)) // (len(codes) // len(zeros))).long()
    return ((codes - zeros[group]) * own["scales"].float()[group]).t().contiguous()


def _compressed(own: dict[str, Tensor], config: dict[str, object]) -> Tensor:
    scale, zero = own["weight_scale"].float(), own.get("weight_zero_point")
    if "weight_packed" in own:
        out_features, in_features = own["weight_shape"].tolist()
        bits = 4 if own["weight_packed"].shape[1] == -(-in_features // 8) else 8
        middle = 1 << (bits - 1)
        codes = (_fields(own["weight_packed"], bits).flatten(1)[:, :in_features] - middle).float()
        if zero is not None and zero.dtype == torch.int32:
            zero = _fields(zero.t().contiguous(), bits).flatten(1)[:, :out_features].t() - middle
    else:
        codes = own["weight"].float()
    codes = codes - (0 if zero is None else _along(zero.float(), codes, own, config))
    return codes * _along(scale, codes, own, config)


def _along(values: Tensor, like: Tensor, own: dict[str, Tensor], config: dict[str, object]) -> Tensor:
    """Say what holds for a tensor, a channel, a group or a block of a weight [out, in] again for each of its values."""
    rows, columns = like.shape
    if values.numel() == 1:
        return values.reshape(1, 1)
    values = values.reshape(values.shape[0], -1)
    if "weight_g_idx" in own:
        return values[:, own["weight_g_idx"].long()]
    height = 1
    if values.shape[0] != rows:
        groups = config["config_groups"]
        assert isinstance(groups, dict)
        height = next(
            group["weights"]["block_structure"][0]
            for group in groups.values()
            if group["weights"].get("block_structure")
        )
    return values.repeat_interleave(height, 0)[:rows].repeat_interleave(columns // values.shape[1], 1)


def adapter_products(folder: Path) -> dict[str, tuple[float, Tensor, Tensor]]:
    """Return (scale, B, A) of each weight that a LoRA adapter changes, by the weight's name; float32, as peft merges them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = _stored([folder / "adapter_model.safetensors"])
    products = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
        patterns = (config.get("alpha_pattern") or {}).items()
        alphas = [alpha for ending, alpha in patterns if re.search(rf"(^|\.)({ending})$", module)]
        alpha = (alphas or [config["lora_alpha"]])[0]
        scale = alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        products[f"{module}.weight"] = (scale, b.float(), a.float())
    return products
