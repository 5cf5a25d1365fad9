"""Makes the one model of the benchmark in each tool's format: `python -m benchmarks.models FORMAT CHECKPOINT OUT`.

Each format is made by a process of its own, so that its memory is its own too. All come from one checkpoint; what is there
already is kept.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from galerne.files import staged_folder

PRESET = "benchmark-1b"
_BLOCKS_OF_256 = Path(__file__).with_name("int4-256.toml")


def make_checkpoint(_: Path, out: Path) -> None:
    """Write a Mistral of 1.1 B random bfloat16 weights, seed 0, as safetensors, and a tokenizer of bytes beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from galerne.export.preset import preset_config
    from galerne.export.synth import write_checkpoint

    symbols = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with staged_folder(out) as folder:
        write_checkpoint(preset_config(PRESET), folder)
        # onnxruntime-genai's builder asks for a tokenizer; the benchmark feeds ids.
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)


def make_bundle(checkpoint: Path, out: Path, recipe: str = "int4-rtn") -> None:
    """Export a bundle with Galerne."""
    from galerne.export.checkpoint.open import open_checkpoint
    from galerne.export.export import export
    from galerne.optimize.quantize import recipe as recipes

    export(open_checkpoint(checkpoint), recipes.load(recipe), out)


def make_bundle_of_256(checkpoint: Path, out: Path) -> None:
    """Export a bundle with Galerne at int4 in blocks of 256."""
    make_bundle(checkpoint, out, str(_BLOCKS_OF_256))


def make_fp16_bundle(checkpoint: Path, out: Path) -> None:
    """Export a bundle with Galerne at float16, for the memory that an export takes."""
    make_bundle(checkpoint, out, "fp16")


def make_engine(_: Path, out: Path) -> None:
    """Build the `cpu` engine into a bundle, anew where the one that is there does not fit this machine."""
    from galerne.errors import GalerneError
    from galerne.optimize.builders.build import build
    from galerne.runtime.bundle import Bundle
    from galerne.runtime.engines.select import open_engine
    from galerne.targets import target as targets

    bundle = Bundle.open(out)
    try:
        open_engine(bundle, "cpu")
    except GalerneError:
        build(bundle, targets.load("cpu"), force=True)


def make_gguf(checkpoint: Path, out: Path) -> None:
    """Write the checkpoint as GGUF: Q4_0, output Q8_0."""
    from gguf import GGMLQuantizationType

    from benchmarks.gguf_file import write_gguf
    from galerne.export.checkpoint.open import open_checkpoint

    q4, q8 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
    write_gguf(open_checkpoint(checkpoint), out, q4, lambda name: q8 if name == "lm_head.weight" else q4)


def make_float_gguf(checkpoint: Path, out: Path) -> None:
    """Write the checkpoint as GGUF in float32, for llama.cpp's own quantizer."""
    from gguf import GGMLQuantizationType

    from benchmarks.gguf_file import write_gguf
    from galerne.export.checkpoint.open import open_checkpoint

    write_gguf(open_checkpoint(checkpoint), out, GGMLQuantizationType.F32)


def make_fp8_checkpoint(source: Path, out: Path) -> None:
    """Write a checkpoint's linear layers as compressed-tensors does at float8: E4M3, one scale for each output channel."""
    import torch
    from safetensors.torch import save_file

    from galerne.export.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(source)
    tensors: dict[str, torch.Tensor] = {}
    for name in checkpoint.shapes():
        weight = torch.from_numpy(checkpoint.read(name).astype("float32"))
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / torch.finfo(torch.float8_e4m3fn).max
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale.half()
        else:
            tensors[name] = weight.half()
        checkpoint.release(name)
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    with staged_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(checkpoint.config | {"quantization_config": quantization}))
        save_file(tensors, folder / "model.safetensors")


FORMATS: dict[str, Callable[[Path, Path], None]] = {
    "checkpoint": make_checkpoint,
    "fp8-checkpoint": make_fp8_checkpoint,
    "bundle": make_bundle,
    "bundle-256": make_bundle_of_256,
    "fp16-bundle": make_fp16_bundle,
    "engine": make_engine,
    "gguf": make_gguf,
    "float-gguf": make_float_gguf,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    FORMATS[arguments.format](arguments.checkpoint, arguments.out)
