"""Folders of safetensors: every tensor as PyTorch has it, and every fault named."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import MistralForCausalLM, PreTrainedTokenizerFast

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint

INDEX = "model.safetensors.index.json"
Edit = Callable[[dict[str, Any]], object]
Refuse = Callable[..., None]


def edit_json(path: Path, change: Edit) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def edit_header(path: Path, change: Edit) -> None:
    """Rewrite a safetensors file's header and leave its tensors' bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_every_tensor_equals_pytorch(
    tmp_path: Path, mistral: Callable[[torch.dtype], MistralForCausalLM], dtype: str, shard_size: str
) -> None:
    model = mistral(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "20KB")
    checkpoint = open_checkpoint(tmp_path)
    state = model.state_dict()
    assert checkpoint.format == "safetensors"
    assert set(checkpoint.shapes()) == set(state)
    bits, torch_bits = (np.uint32, torch.uint32) if dtype == "float32" else (np.uint16, torch.uint16)
    for name, tensor in state.items():
        values = checkpoint.read(name)
        assert values.shape == checkpoint.shapes()[name] == tuple(tensor.shape)
        assert values.dtype.name == checkpoint.dtype(name) == dtype
        np.testing.assert_array_equal(values.view(bits), tensor.view(torch_bits).numpy())


def test_a_tensor_is_a_view_that_survives_release(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    name = "model.embed_tokens.weight"
    values = checkpoint.read(name)
    before = values.copy()
    checkpoint.release(name)
    assert not values.flags.owndata
    assert not values.flags.writeable
    del checkpoint
    np.testing.assert_array_equal(values, before)


def test_config_is_raw(folder: Path) -> None:
    config = open_checkpoint(folder).config
    assert config == json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["sliding_window"] == 8


def test_files_are_all_that_the_model_is_made_from(sharded: Path) -> None:
    (sharded / "README.md").write_text("not of the model")
    (sharded / "tokenizer.json").write_text("{}")
    names = [path.name for path in open_checkpoint(sharded).files()]
    assert len(names) == len(set(names))
    assert set(names) == {path.name for path in sharded.iterdir()} - {"README.md"}


def test_tokenizer_files_are_as_saved(folder: Path) -> None:
    generation = {"generation_config.json": (folder / "generation_config.json").read_bytes()}
    assert open_checkpoint(folder).tokenizer_files() == generation
    words = Tokenizer(WordLevel({"<s>": 0, "wind": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    files = open_checkpoint(folder).tokenizer_files()
    assert set(files) >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for name, data in files.items():
        assert data == (folder / name).read_bytes()


def test_sentencepiece_alone_is_refused(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"\x0a")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(InputError, match=r"found tokenizer\.model but no tokenizer\.json"):
        checkpoint.tokenizer_files()


def test_bad_config(folder: Path, refuse: Refuse) -> None:
    config = folder / "config.json"
    config.write_text("[1]")
    refuse(folder, str(config), "expected a table, found list")
    config.write_text("{'a': 1}")
    refuse(folder, str(config), "not JSON")
    config.write_bytes(b"\xff\xfe\xff")
    refuse(folder, str(config), "not JSON")
    config.unlink()
    refuse(folder, str(folder), "no config.json")


def test_no_weights(folder: Path, refuse: Refuse) -> None:
    (folder / "model.safetensors").unlink()
    refuse(folder, "no weights", "model.safetensors")
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    refuse(folder, "pytorch_model*.bin", "convert it to safetensors")


def test_missing_shard(sharded: Path, refuse: Refuse) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(sharded, str(shard), "no such shard", str(sharded / INDEX))


def test_index_names_a_tensor_that_the_shard_lacks(sharded: Path, refuse: Refuse) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"model.ghost": shard.name}))
    refuse(sharded, str(shard), "model.ghost", "not in this shard")


@pytest.mark.parametrize("shard", ["../single/model.safetensors", "/etc/passwd", "..", 3])
def test_index_leads_out_of_the_folder(sharded: Path, shard: object, refuse: Refuse) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"model.ghost": shard}))
    refuse(sharded, str(sharded / INDEX), "model.ghost", repr(shard))


def test_index_without_a_map(sharded: Path, refuse: Refuse) -> None:
    (sharded / INDEX).write_text("{}")
    refuse(sharded, str(sharded / INDEX), "weight_map")


@pytest.mark.parametrize(
    ("keep", "words"), [(0, "empty"), (5, "header length"), (40, "header length"), (-7, "cut off")]
)
def test_truncated(folder: Path, keep: int, words: str, refuse: Refuse) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep] if keep else b"")
    refuse(folder, str(file), words)


def test_trailing_bytes(folder: Path, refuse: Refuse) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    refuse(folder, str(file), "size: expected")


def test_garbage(folder: Path, refuse: Refuse) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"!" + data[9:])
    refuse(folder, str(file), "header: not JSON")
    file.write_bytes(b"<html>not the file, but a page about it</html>")
    refuse(folder, str(file), "no safetensors file")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header[NORM].update(data_offsets=[-64, 0]), "data_offsets: expected a start and an end"),
        (lambda header: header[NORM].update(data_offsets=[64, 0]), "data_offsets: expected a start and an end"),
        (lambda header: header[NORM].update(data_offsets=[0, 64]), "overlaps another"),
        (lambda header: header[NORM].update(data_offsets=[1 << 40, (1 << 40) + 64]), "a hole"),
        (lambda header: header[NORM].update(data_offsets=[0, 62]), "expected 64 bytes for BF16 [32]"),
        (lambda header: header[NORM].update(data_offsets=[0, True]), "data_offsets"),
        (lambda header: header[NORM].update(shape=[-32]), "shape"),
        (lambda header: header[NORM].update(shape="32"), "shape"),
        (lambda header: header[NORM].update(shape=[0, 1 << 70]), "shape"),
        (lambda header: header[NORM].update(shape=[1] * 100), "shape"),
        (lambda header: header[NORM].update(dtype="BF17"), "'BF17'"),
        (lambda header: header[NORM].pop("dtype"), "dtype: None"),
        (lambda header: header.update({NORM: 3}), "expected a table, found 3"),
        (lambda header: header.pop(NORM), ""),
    ],
)
def test_header_that_lies(folder: Path, change: Edit, words: str, refuse: Refuse) -> None:
    file = folder / "model.safetensors"
    edit_header(file, change)
    refuse(folder, str(file), words)


def test_type_that_is_not_read(folder: Path) -> None:
    edit_header(folder / "model.safetensors", lambda header: header[NORM].update(dtype="I16"))
    checkpoint = open_checkpoint(folder)
    expected = re.escape(f"{NORM!r}: type I16 is not supported; expected F32, F16, BF16")
    with pytest.raises(InputError, match=expected):
        checkpoint.dtype(NORM)
    with pytest.raises(InputError, match=expected):
        checkpoint.read(NORM)


def test_empty_tensor(folder: Path) -> None:
    edit_header(
        folder / "model.safetensors",
        lambda header: header.update(none={"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}),
    )
    values = open_checkpoint(folder).read("none")
    assert (values.shape, values.dtype.name) == ((0, 3), "float32")


def test_unknown_tensor(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    with pytest.raises(InputError, match=r"lm_tail\.weight: no such tensor"):
        checkpoint.read("lm_tail.weight")


def test_path_that_is_no_checkpoint(folder: Path, tmp_path: Path, refuse: Refuse) -> None:
    refuse(tmp_path / "nowhere", "nowhere", "found nothing")
    refuse(folder / "model.safetensors", "a .safetensors file", "expected a folder")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refuse(tmp_path, "give that file", "model.gguf")
