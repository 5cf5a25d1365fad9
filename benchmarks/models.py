"""Makes the one model of the benchmark in each tool's format: `python -m benchmarks.models FORMAT CHECKPOINT OUT`.

Each format is made by a process of its own, so that its memory is its own too. All come from one checkpoint; what is there
already is kept.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import VOCAB_SIZE
from galerne.files import staged_folder

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 2048, 22, 32, 4, 64, 5632
WINDOW, MAX_POSITIONS, ROPE_THETA, NORM_EPS = 1024, 4096, 1e4, 1e-5


def make_checkpoint(_: Path, out: Path) -> None:
    """Write a Mistral of 1.1 B random bfloat16 weights, seed 0, as safetensors, and a tokenizer of bytes beside it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    config = MistralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        sliding_window=WINDOW,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )
    symbols = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with staged_folder(out) as folder:
        MistralForCausalLM(config).save_pretrained(folder)
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
    """Write the checkpoint as GGUF: Q4_0, output Q8_0, norms float32, under llama.cpp's name for the architecture."""
    import gguf
    from safetensors import safe_open

    q4, q8 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
    staging = out.with_name(f".{out.name}.part")
    writer = gguf.GGUFWriter(staging, "llama")
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            weight = file.get_tensor(name).float().numpy()
            stored = names.get_name(name, try_suffixes=(".weight",))
            assert stored is not None, name
            if weight.ndim == 1:
                writer.add_tensor(stored, weight)
                continue
            if "q_proj" in name or "k_proj" in name:
                # llama.cpp rotates neighbouring pairs and Mistral the halves of a head: [heads, 2, D/2, in], 2 moved inwards.
                halves = weight.reshape(-1, 2, HEAD_DIM // 2, HIDDEN)
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            kind = q8 if name == "lm_head.weight" else q4
            writer.add_tensor(stored, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(staging, out)


FORMATS: dict[str, Callable[[Path, Path], None]] = {
    "checkpoint": make_checkpoint,
    "bundle": make_bundle,
    "fp16-bundle": make_fp16_bundle,
    "engine": make_engine,
    "gguf": make_gguf,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    FORMATS[arguments.format](arguments.checkpoint, arguments.out)
