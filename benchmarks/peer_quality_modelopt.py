"""NVIDIA ModelOpt's int4 AWQ in torch, weights rounded but computed as floats: `python -m benchmarks.peer_quality_modelopt`.

Runs in an environment of its own. Blocks are of 128, or of 64 where 128 does not divide the input axis, as Galerne's recipes have
them; all else is its INT4_AWQ_CFG, which leaves the vocabulary projection as it is. Nothing is written to disk but the logits,
so the size is counted: products at 4 bits and a float16 scale a block, all else in float16.
"""

import argparse
import copy
import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

# By name, since it is no dependency of this project and not there to be type-checked.
mtq = importlib.import_module("modelopt.torch.quantization")
_BLOCKS = (128, 64, 32)
_SEQUENCES = 8  # its search runs the whole model over all of them for each of eleven exponents


def load(checkpoint: Path) -> Any:
    """Load a folder or a GGUF file in float32."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(checkpoint)}
    if checkpoint.is_file():
        where = {"pretrained_model_name_or_path": str(checkpoint.parent), "gguf_file": checkpoint.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager").eval()


def config(model: Any) -> tuple[dict[str, Any], float, int]:
    """Return INT4_AWQ_CFG with a block for each product, the bits of a weight of the products, and the whole size in bytes."""
    made = copy.deepcopy(mtq.INT4_AWQ_CFG)
    weights = bits = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            block = next(size for size in _BLOCKS if module.in_features % size == 0)
            weights += module.weight.numel()
            bits += module.weight.numel() * 4 + module.weight.numel() // block * 16
            if block != _BLOCKS[0]:
                form = {"num_bits": 4, "block_sizes": {-1: block, "type": "static"}}
                made["quant_cfg"].append({"quantizer_name": f"*{name}.weight_quantizer", "cfg": form})
    others = sum(each.numel() for each in model.parameters()) - weights
    return made, bits / weights, bits // 8 + 2 * others


def main() -> None:
    """Quantize, write the logits, and print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="not used: it writes no model")
    parser.add_argument("--logits", type=argparse.FileType("wb"), required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.checkpoint)
    calibration: NDArray[np.int64] = np.load(args.calibration)[:_SEQUENCES]
    form, bits, size = config(model)

    def forward(inner: Any) -> None:
        for row in calibration:
            inner(torch.from_numpy(row[None]), use_cache=False)

    start = time.perf_counter()
    with torch.inference_mode():
        model = mtq.quantize(model, form, forward)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        for row in np.load(args.ids):
            logits = model(torch.from_numpy(row[None]), use_cache=False).logits
            args.logits.write(logits.numpy().tobytes())
    print(json.dumps({"size_bytes": size, "product_bits": bits, "seconds": seconds}))


if __name__ == "__main__":
    main()
