"""Writes a checkpoint of Llama's or Mistral's kind as a GGUF file, under llama.cpp's name for the architecture."""

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.families.registry import read_spec

_FILE_TYPES = {
    GGMLQuantizationType.F32: gguf.LlamaFileType.ALL_F32,
    GGMLQuantizationType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}


def write_gguf(
    checkpoint: Checkpoint,
    out: Path,
    file_type: GGMLQuantizationType,
    type_of: Callable[[str], GGMLQuantizationType] | None = None,
) -> None:
    """Write a model without its vocabulary, for a benchmark that feeds ids; norms are float32. `out` appears whole.

    llama.cpp runs this architecture without a sliding window.

    Args:
        file_type: the type of most weights. type_of: of a weight by its name in the checkpoint, where not all are of that type.
    """
    spec = read_spec(checkpoint.config, str(checkpoint.path))
    staging = out.with_name(f".{out.name}.part")
    writer = gguf.GGUFWriter(staging, "llama")
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_hidden_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_attention_heads)
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.layer_rotary[0].theta)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(_FILE_TYPES[file_type])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, spec.num_hidden_layers)
    for name in checkpoint.shapes():
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, name
        weight = checkpoint.read(name).astype(np.float32)
        checkpoint.release(name)
        if weight.ndim == 1:
            writer.add_tensor(stored, weight)
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = neighbours(weight, spec.head_dim)
        kind = file_type if type_of is None else type_of(name)
        writer.add_tensor(stored, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(staging, out)


def neighbours(weight: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Bring the rows of a query or key projection [heads * head_dim, in] into llama.cpp's order.

    llama.cpp rotates neighbouring pairs and Mistral the halves of a head: [heads, 2, D/2, in], 2 moved inwards.
    """
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
