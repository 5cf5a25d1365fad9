"""GGUF files that are damaged or not supported: every fault is named, and none ends in an error that is not ours."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint

Refuse = Callable[..., None]


@pytest.mark.parametrize(
    "key",
    [
        "rope.freq_base",
        "attention.layer_norm_rms_epsilon",
        "attention.head_count",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "context_length",
    ],
)
def test_missing_number(tiny_gguf: Any, key: str, refuse: Refuse) -> None:
    del tiny_gguf.metadata[f"llama.{key}"]
    refuse(tiny_gguf.write(), f"llama.{key}: missing")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.attention.head_count": 0}, "llama.attention.head_count: expected a positive integer, found 0"),
        ({"llama.block_count": "one"}, "llama.block_count: expected a positive integer, found 'one'"),
        ({"llama.rope.freq_base": "1e4"}, "llama.rope.freq_base: expected a number, found '1e4'"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count: found 8, expected the head's size 16"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length: found 32"),
        ({"split.count": 3}, "split.count: one of 3 files"),
        ({"general.alignment": 24}, "general.alignment: expected a power of two, found 24"),
    ],
)
def test_wrong_metadata(tiny_gguf: Any, metadata: dict[str, object], words: str, refuse: Refuse) -> None:
    tiny_gguf.metadata |= metadata
    refuse(tiny_gguf.write(), words)


def test_other_architecture(tiny_gguf: Any, refuse: Refuse) -> None:
    tiny_gguf.arch = "bloom"
    refuse(
        tiny_gguf.write(), "general.architecture: 'bloom' is not supported", "supported: llama, qwen2, qwen3, gemma3"
    )


def test_tensor_of_another_kind_of_model(tiny_gguf: Any, refuse: Refuse) -> None:
    tiny_gguf.tensors["blk.0.ffn_gate_exps.weight"] = np.zeros((2, 64, 64), np.float32)
    refuse(tiny_gguf.write(), "blk.0.ffn_gate_exps.weight", "no tensor of a dense llama model")


def test_no_embedding(tiny_gguf: Any, refuse: Refuse) -> None:
    del tiny_gguf.tensors["token_embd.weight"]
    refuse(tiny_gguf.write(), "token_embd.weight: no such tensor")


def test_type_that_is_not_read(tiny_gguf: Any) -> None:
    tiny_gguf.tensors["output.weight"] = np.zeros((96, 64), np.int32)
    checkpoint = open_checkpoint(tiny_gguf.write())
    with pytest.raises(InputError, match=r"output\.weight: type I32 is not supported"):
        checkpoint.read("lm_head.weight")


def test_unknown_tensor(tiny_gguf: Any) -> None:
    with pytest.raises(InputError, match=r"lm_tail\.weight: no such tensor"):
        open_checkpoint(tiny_gguf.write()).read("lm_tail.weight")


def test_heads_that_do_not_divide_the_rows(tiny_gguf: Any) -> None:
    tiny_gguf.tensors["blk.0.attn_q.weight"] = np.zeros((60, 64), np.float32)
    with pytest.raises(InputError, match="60 rows do not divide into 4 heads"):
        open_checkpoint(tiny_gguf.write()).read("model.layers.0.self_attn.q_proj.weight")


def test_tokenizer_that_transformers_cannot_convert(tiny_gguf: Any) -> None:
    tiny_gguf.metadata["tokenizer.ggml.model"] = "gpt2"
    with pytest.raises(InputError, match=r"tiny\.gguf: tokenizer: transformers cannot convert it"):
        open_checkpoint(tiny_gguf.write()).tokenizer_files()


def test_not_gguf(tiny_gguf: Any, refuse: Refuse) -> None:
    tiny_gguf.path.write_bytes(b"")
    refuse(tiny_gguf.path, "empty")
    tiny_gguf.path.write_bytes(b"PK\x03\x04 and so on")
    refuse(tiny_gguf.path, "expected a GGUF file")
    tiny_gguf.path.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(64))
    refuse(tiny_gguf.path, "version: found 50331648, expected 2 or 3")


def test_counts_that_would_loop_for_ever(tiny_gguf: Any, refuse: Refuse) -> None:
    key = struct.pack("<Q", 1) + b"a"
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key
    for tail in (
        struct.pack("<IIQ", 9, 4, 1 << 60),  # an array of numbers
        struct.pack("<IIQ", 9, 8, 1 << 60),  # an array of strings
        struct.pack("<IQ", 8, 1 << 60),  # a string
    ):
        tiny_gguf.path.write_bytes(start + tail)
        refuse(tiny_gguf.path, "a: runs past the end of the file")
    tiny_gguf.path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0))
    refuse(tiny_gguf.path, "a tensor's name: runs past the end")
    tiny_gguf.path.write_bytes(start + struct.pack("<I", 99))
    refuse(tiny_gguf.path, "a: found a value of unknown type 99")


def tensor_file(path: Path, *tensors: bytes) -> Path:
    """Write a file of no metadata, the given tensor entries and 64 bytes of data."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(64))
    return path


def entry(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    size = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
    return size + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset)


def test_tensor_entries_that_lie(tiny_gguf: Any, refuse: Refuse) -> None:
    path = tiny_gguf.path
    refuse(tensor_file(path, entry(b"a", (8,), 0, 0), entry(b"b", (8,), 0, 16)), "b: overlaps the tensor before it")
    refuse(tensor_file(path, entry(b"a", (8,), 0, 64)), "a: ends at byte", "truncated")
    refuse(tensor_file(path, entry(b"a", (8,), 999, 0)), "a: tensor type 999 is not supported")
    refuse(tensor_file(path, entry(b"a", (31,), 8, 0)), "a: found shape [31] for Q8_0")
    refuse(tensor_file(path, entry(b"a", (0,), 0, 0)), "a: found shape [0]")
    refuse(tensor_file(path, entry(b"a", (1,) * 9, 0, 0)), "a: found 9 dimensions")
    refuse(tensor_file(path, entry(b"a", (8,), 0, 0), entry(b"a", (8,), 0, 32)), "two tensors have one name")
    refuse(tensor_file(path, entry(b"\xff", (8,), 0, 0)), "not UTF-8")


def test_every_cut(tiny_gguf: Any, refuse: Refuse) -> None:
    whole = tiny_gguf.write().read_bytes()
    for cut in (*range(1, 1500, 7), len(whole) - 1):
        tiny_gguf.path.write_bytes(whole[:cut])
        refuse(tiny_gguf.path)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1500), value=st.integers(0, 255))
def test_a_changed_byte_is_an_input_error_or_harmless(tiny_gguf: Any, place: int, value: int) -> None:
    damaged = bytearray(tiny_gguf.write().read_bytes())
    damaged[place] = value
    tiny_gguf.path.write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(tiny_gguf.path)
        for name, shape in checkpoint.shapes().items():
            assert checkpoint.read(name).shape == shape
    except InputError as exc:
        assert "\n" not in str(exc)
