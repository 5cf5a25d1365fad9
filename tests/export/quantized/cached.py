"""A checkpoint whose keys and values are rounded, written by hand, and transformers' own cache that rounds as it does."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

SCHEME: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}
Scales = dict[str, Tensor]


class RoundedCache(DynamicCache):
    """Keeps keys and values as compressed-tensors' own rounding leaves them."""

    def __init__(self, config: Any, scales: Scales) -> None:
        super().__init__(config=config)
        self._scales = scales

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Round [B, Hkv, S, D] and keep."""
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize

        rounded = [
            fake_quantize(
                states,
                self._scales[f"model.layers.{layer_idx}.self_attn.{part}_scale"],
                None,
                QuantizationArgs(**SCHEME),
            )
            for part, states in (("k", key_states), ("v", value_states))
        ]
        return super().update(*rounded, layer_idx, *args, **kwargs)


@torch.no_grad()
def round_cache_of(source: Path, folder: Path) -> Scales:
    """Copy a checkpoint of floats and add scales of its keys and values on random tokens; return them."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    cache: Any = DynamicCache()  # without the config, so without a window: it keeps all
    ids = torch.randint(0, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(3))
    model(ids, cache=cache)
    scales = {
        f"model.layers.{number}.self_attn.{part}_scale": states.abs().max().reshape(1) / 127
        for number, layer in enumerate(cache.layers)
        for part, states in (("k", layer.keys), ("v", layer.values))
    }
    shutil.copytree(source, folder)
    write_scales(folder, scales)
    return scales


def write_scales(folder: Path, scales: Scales, **scheme: Any) -> None:
    """Write scales into a checkpoint, and `kv_cache_scheme` with some fields changed into its config."""
    tensors, table = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    others = {name: tensor for name, tensor in tensors.items() if not name.endswith(("k_scale", "v_scale"))}
    save_file(others | scales, folder / "model.safetensors", metadata={"format": "pt"})
    table["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": SCHEME | scheme,
    }
    (folder / "config.json").write_text(json.dumps(table))
