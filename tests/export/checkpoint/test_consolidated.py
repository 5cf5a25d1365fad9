"""Mistral's own layout: the bundle's weights and tokens are those of the same model in Hugging Face's files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.checkpoint.tekken import convert_tekken
from galerne.export.export import export
from galerne.export.parity.verify import verify
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import WEIGHTS, Bundle
from galerne.runtime.tokenizer import Tokenizer

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
PARAMS: dict[str, Any] = {
    "dim": 128,
    "n_layers": 2,
    "head_dim": 32,
    "hidden_dim": 160,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-6,
    "vocab_size": 501,
    "rope_theta": 10000.0,
    "sliding_window": 16,
    "max_seq_len": 512,
}


def native(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Hugging Face model's tensors, and undo what its conversion did to queries and keys."""
    result = {}
    for name, tensor in tensors.items():
        if ".q_proj" in name or ".k_proj" in name:
            heads = tensor.shape[0] // 32  # [heads, 2, pairs, in] -> [heads, pairs, 2, in]
            tensor = tensor.reshape(heads, 2, 16, -1).transpose(1, 2).reshape(tensor.shape)
        for other, own in NAMES.items():
            name = name.replace(f"{other}.", f"{own}.")
        result[name.removeprefix("model.")] = tensor.contiguous()
    return result


@pytest.fixture
def folder(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """The shared Mistral in Mistral's own layout."""
    made = tmp_path / "native"
    made.mkdir()
    save_file(native(load_file(checkpoint_folder / "model.safetensors")), made / "consolidated.safetensors")
    (made / "params.json").write_text(json.dumps(PARAMS))
    return made


def test_same_weights_as_the_hugging_face_files(
    folder: Path, bundle_of: Callable[[str], Bundle], tmp_path: Path
) -> None:
    for name in ("fp16", "int4-rtn"):
        made = export(open_checkpoint(folder), recipe.load(name), tmp_path / name, chunk=8)
        other = bundle_of(name)
        assert made.file(WEIGHTS).read_bytes() == other.file(WEIGHTS).read_bytes()
        assert made.manifest.source.format == "consolidated"
        assert set(made.manifest.source.files) == {"params.json", "consolidated.safetensors"}
        assert made.manifest.model.layer_windows == (16, 16)


@pytest.mark.slow  # the weights are those of a bundle that other tests verify
def test_parity_of_the_layout(folder: Path, tmp_path: Path) -> None:
    report = verify(export(open_checkpoint(folder), recipe.load("int4-rtn"), tmp_path / "b"), open_checkpoint(folder))
    assert report.passed, [case for case in report.cases if not case.passed]


def test_several_files(folder: Path, checkpoint_folder: Path) -> None:
    tensors = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    for number in (1, 2):
        own = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % 2 == number - 1}
        save_file(own, folder / f"consolidated-0000{number}-of-00002.safetensors")
    checkpoint, other = open_checkpoint(folder), open_checkpoint(checkpoint_folder)
    assert checkpoint.shapes() == other.shapes()
    for name in other.shapes():
        assert (checkpoint.read(name) == other.read(name)).all(), name
    (folder / "consolidated-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="found 1 files of 2; download the others"):
        open_checkpoint(folder)


def test_hugging_face_files_beside_it_come_first(folder: Path, checkpoint_folder: Path) -> None:
    shutil.copy(checkpoint_folder / "config.json", folder)
    assert open_checkpoint(folder).format == "consolidated"
    shutil.copy(checkpoint_folder / "model.safetensors", folder)
    assert open_checkpoint(folder).format == "safetensors"


@pytest.mark.parametrize(
    ("params", "window", "kinds"),
    [
        ({"sliding_window": ...}, None, None),
        ({"sliding_window": None}, None, None),
        ({"sliding_window": [None, 16]}, 16, ["full_attention", "sliding_attention"]),
        ({"sliding_window": 16, "_sliding_window": [16, None]}, 16, ["sliding_attention", "full_attention"]),
        ({"sliding_window": [16]}, 16, None),
        ({"sliding_window": [None]}, None, None),
    ],
)
def test_windows(folder: Path, params: dict[str, Any], window: int | None, kinds: list[str] | None) -> None:
    changed = {key: value for key, value in (PARAMS | params).items() if value is not ...}
    (folder / "params.json").write_text(json.dumps(changed))
    config = open_checkpoint(folder).config
    assert (config["sliding_window"], config.get("layer_types")) == (window, kinds)


def test_layers_with_and_without_a_window_match_transformers(folder: Path, tmp_path: Path) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | {"sliding_window": [None, 16]}))
    checkpoint = open_checkpoint(folder)
    report = verify(export(checkpoint, recipe.load("fp32"), tmp_path / "out", chunk=8, max_context=96), checkpoint)
    assert report.passed, [case for case in report.cases if not case.passed]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"rope_theta": None},
            "rope_theta: expected a number, found None; Mistral 7B v0.1, which leaves it out, has 10000.0",
        ),
        ({"n_heads": "4"}, "n_heads: expected a number, found '4'"),
        ({"moe": {"num_experts": 8}}, "moe: a table is not supported"),
        ({"vision_encoder": {"x": 1}}, "vision_encoder: a table is not supported"),
        ({"yarn": {"factor": 4}}, "yarn: a table is not supported"),
        ({"use_biases": True}, "use_biases: True is not supported"),
        ({"sliding_window": [None, 16, 8]}, "sliding_window: expected null, a number or a list"),
        ({"sliding_window": [8, 16]}, "sliding_window: expected null, a number or a list"),
        ({"sliding_window": 0}, "sliding_window: expected null, a number or a list"),
        ({"n_heads": 5}, "wq.weight: 128 rows do not divide into 5 heads"),
    ],
)
def test_params_that_are_not_read_are_named(folder: Path, params: dict[str, Any], message: str) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_an_unknown_tensor_and_a_bad_file_are_named(folder: Path) -> None:
    weights = folder / "consolidated.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"layers.0.feed_forward.gate.weight": torch.zeros(8, 128)}, weights)
    with pytest.raises(InputError, match=r"layers.0.feed_forward.gate.weight: no tensor of a dense Mistral"):
        open_checkpoint(folder)
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(InputError, match="the download was cut off"):
        open_checkpoint(folder)


TEXTS = [
    "Hello, world!",
    "  two spaces, a\ttab and\n\n\nlines ",
    "Le cœur a ses raisons que la raison ne connaît point. 日本語のテキスト 🎉👩‍👩‍👧",
    "def f(x):\n    return x ** 2 + 3.14159  # 1234567890",
    "camelCaseHTTPServer's don't WE'LL",
]


@pytest.fixture(scope="session")
def tekken_path() -> Path:
    """A real tekken.json, which mistral-common carries."""
    common = pytest.importorskip(
        "mistral_common", reason="mistral-common, which carries a tekken.json, is not installed"
    )
    return next(iter(sorted((Path(common.__file__).parent / "data").glob("tekken_240911.json"))))


def test_tekken_gives_the_ids_of_mistral_common(folder: Path, tekken_path: Path, tmp_path: Path) -> None:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    shutil.copy(tekken_path, folder / "tekken.json")
    bundle = export(open_checkpoint(folder), recipe.load("fp16"), tmp_path / "out", chunk=8)
    assert "tekken.json" in bundle.manifest.source.files
    tokenizer, reference = Tokenizer.open(bundle), Tekkenizer.from_file(tekken_path)
    for text in TEXTS:
        wanted = reference.encode(text, bos=True, eos=False)
        assert tokenizer.encode(text) == wanted, text
        assert tokenizer.encode(text, special=False) == wanted[1:], text
        assert tokenizer.decode(wanted[1:]) == text


def test_tekken_control_tokens_of_a_chat(tekken_path: Path) -> None:
    """A chat that mistral-common encodes, written out with its control tokens, gives the same ids."""
    import tokenizers
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    converted = tokenizers.Tokenizer.from_str(convert_tekken(tekken_path)["tokenizer.json"].decode())
    messages = [UserMessage(content="Quelle heure ?"), AssistantMessage(content="Midi."), UserMessage(content="Merci!")]
    encoded = MistralTokenizer.from_file(str(tekken_path)).encode_chat_completion(
        ChatCompletionRequest(messages=messages)
    )
    text = "<s>[INST]Quelle heure ?[/INST]Midi.</s>[INST]Merci![/INST]"
    assert converted.encode(text, add_special_tokens=False).ids == encoded.tokens
    for token in ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "<pad>"):
        assert (
            converted.token_to_id(token) is not None and len(converted.encode(token, add_special_tokens=False).ids) == 1
        )


def test_a_tekken_file_that_is_none(folder: Path, tmp_path: Path) -> None:
    (folder / "tekken.json").write_text('{"config": {}}')
    with pytest.raises(InputError, match=r"tekken.json: transformers cannot convert it"):
        export(open_checkpoint(folder), recipe.load("fp16"), tmp_path / "out", chunk=8)
    assert not (tmp_path / "out").exists()


def test_sentencepiece_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.model.v3").write_bytes(b"x")
    with pytest.raises(InputError, match=r"found tokenizer.model.v3 but neither tekken.json nor tokenizer.json"):
        export(open_checkpoint(folder), recipe.load("fp16"), tmp_path / "out", chunk=8)
