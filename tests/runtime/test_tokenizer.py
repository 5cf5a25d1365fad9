"""Encoding as transformers does it, and streams that equal the decoding of the whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from galerne.errors import InputError
from galerne.runtime.bundle import TOKENIZER, Bundle, entry_of
from galerne.runtime.manifest import SCHEMA_VERSION, GraphFacts, Manifest, ModelFacts, Source
from galerne.runtime.tokenizer import Tokenizer

_CORPUS = ["The mistral blows cold and dry from the north.", "Le vent se lève, il faut tenter de vivre.", "風が吹く 😀"]


def _sentencepiece_like(decoder: decoders.Decoder | None, *, byte_fallback: bool = True) -> Library:
    """A vocabulary in the manner of Llama and Mistral v0.1, with a BOS that the post-processor adds."""
    words = ["<unk>", "<s>", "</s>"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    words += ["▁", "▁▁", "▁a", "a", "b", "▁the", "the", "\ufffd", "e\u0301", "日", "<", ".▁"]
    library = Library(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=byte_fallback, unk_token="<unk>")
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    if decoder is not None:
        library.decoder = decoder
    library.add_special_tokens(["<s>", "</s>"])
    library.add_tokens(["[TOOL]"])
    return library


def _byte_level() -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return library


def _byte_level_with_added() -> Library:
    """Added tokens, some of which the decoder takes for bytes: "é" alone stands for the byte 0xE9."""
    library = _byte_level()
    library.add_tokens(["é", "日本", "aé日", " x"])
    return library


def _llama() -> Library:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _sentencepiece_like(decoders.Sequence(steps))


def _gemma() -> Library:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _sentencepiece_like(decoders.Sequence(steps))


def _byte_level_in_sequence() -> Library:
    library = _byte_level()
    library.decoder = decoders.Sequence([decoders.ByteLevel()])
    return library


# The last three hang on the whole sequence and so come out whole at the end.
_LIBRARIES: dict[str, Callable[[], Library]] = {
    "byte_level": _byte_level,
    "byte_level_with_added": _byte_level_with_added,
    "byte_level_in_sequence": _byte_level_in_sequence,
    "llama": _llama,
    "gemma": _gemma,
    "metaspace": lambda: _sentencepiece_like(decoders.Metaspace()),
    "metaspace_never": lambda: _sentencepiece_like(decoders.Metaspace(prepend_scheme="never")),
    "no_decoder": lambda: _sentencepiece_like(None),
    "strip_each": lambda: _sentencepiece_like(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0), decoders.Fuse()])
    ),
    "suffix": lambda: _sentencepiece_like(decoders.BPEDecoder(suffix="b")),
    "replace_across": lambda: _sentencepiece_like(
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")]), byte_fallback=False
    ),
    "wordpiece": lambda: _sentencepiece_like(decoders.WordPiece()),
}
_TOKENIZERS = {name: (build().get_vocab_size(), Tokenizer(build())) for name, build in _LIBRARIES.items()}


def _ids(library: Library, *tokens: str) -> list[int]:
    vocabulary = library.get_vocab()
    return [vocabulary[token] for token in tokens]


def _stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


@pytest.mark.parametrize("name", _LIBRARIES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_stream_joined_is_the_whole_decoded(name: str, data: st.DataObject) -> None:
    """Any ids at all: special ones, ones beyond the vocabulary, broken UTF-8, genuine U+FFFD."""
    size, tokenizer = _TOKENIZERS[name]
    interesting = st.sampled_from([3 + byte for byte in "日é😀�".encode()]) | st.integers(max(0, size - 16), size + 1)
    ids = data.draw(st.lists(interesting | st.integers(0, size - 1), max_size=12))
    assert "".join(_stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_stream_shows_no_false_replacement_character(name: str, text: str) -> None:
    tokenizer = _TOKENIZERS[name][1]
    pieces = _stream(tokenizer, tokenizer.encode(text, special=False))
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_byte_level_shows_a_split_character_when_it_is_complete() -> None:
    tokenizer = _TOKENIZERS["byte_level"][1]
    ids = _ids(_byte_level(), "ð", "Ł", "ĺ", "Ģ")
    assert _stream(tokenizer, ids) == ["", "", "", "😀", ""]
    assert _stream(tokenizer, ids[:2]) == ["", "", "\ufffd"]


def test_byte_tokens_are_certain_only_when_their_run_ends() -> None:
    library, tokenizer = _llama(), _TOKENIZERS["llama"][1]
    euro = _ids(library, "▁a", "<0xE2>", "<0x82>", "<0xAC>", "b")
    assert _stream(tokenizer, euro) == ["a", "", "", "", "€b", ""]
    broken = _ids(library, "a", "<0x41>", "<0xFF>")
    assert _stream(tokenizer, broken) == ["a", "", "", "\ufffd\ufffd"]


def test_stream_strips_the_first_space_only() -> None:
    library, tokenizer = _llama(), _TOKENIZERS["llama"][1]
    ids = _ids(library, "<s>", "▁the", "▁the", "▁", "▁a")
    assert _stream(tokenizer, ids) == ["", "the", " the", " ", " a", ""]
    assert _stream(tokenizer, _ids(library, "▁", "▁a")) == ["", " a", ""]


def test_stream_asks_the_library_once_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps a long stream cheap: after the first time a token's text is at hand."""
    library = _llama()
    tokenizer = Tokenizer(library)
    stream = tokenizer.stream()
    ids = _ids(library, "▁a", "b", "▁the")
    first = [stream.push(token_id) for token_id in ids + ids]
    calls: list[object] = []
    monkeypatch.setattr(tokenizer, "_library", None)
    monkeypatch.setattr(tokenizer._vocabulary, "text", lambda ids: calls.append(ids))
    assert [stream.push(token_id) for token_id in ids] == first[3:]
    assert not calls


@pytest.mark.parametrize("name", ["byte_level", "llama"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("ab the日é😀\n")) | st.text(max_size=20), special=st.booleans())
def test_encodes_as_transformers_does(name: str, text: str, special: bool) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=_LIBRARIES[name]())
    assert _TOKENIZERS[name][1].encode(text, special=special) == reference(text, add_special_tokens=special).input_ids


def test_decode_keeps_special_tokens_on_request() -> None:
    tokenizer = Tokenizer(_llama())
    ids = tokenizer.encode("a</s>")
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special=False) == "<s> a</s>"


@pytest.mark.parametrize(
    ("text", "special", "count"),
    [("a", True, 1), ("<s>a", True, 1), ("<s>", True, 1), ("a", False, 0), ("<s>a", False, 1)],
)
def test_bos_comes_once(text: str, special: bool, count: int) -> None:
    ids = Tokenizer(_llama(), bos_token_id=1).encode(text, special=special)
    assert ids.count(1) == count
    assert ids.index(1) == 0 if count else True


def test_bos_that_the_caller_wrote_twice_stays() -> None:
    library = _byte_level()
    start = library.token_to_id("<|im_start|>")
    assert Tokenizer(library, start).encode("<|im_start|><|im_start|>") == [start, start]


def test_padding_and_truncation_of_the_file_do_not_reach_prompts() -> None:
    library = _llama()
    library.enable_padding(length=50)
    library.enable_truncation(2)
    assert len(Tokenizer(library).encode("abab")) == 6


def test_refuses_text_that_is_no_unicode() -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        Tokenizer(_llama()).encode("a\udcff")


def _bundle(folder: Path, content: bytes | None) -> Bundle:
    files = {}
    if content is not None:
        (folder / TOKENIZER).write_bytes(content)
        files[TOKENIZER] = entry_of(folder / TOKENIZER)
    model = ModelFacts("MistralForCausalLM", 1, 8, 16, 2, 1, 4, 273, (16,), 1e4, 64, False, 1, (2,))
    graph = GraphFacts("opset24", 24, "float16", 16, (32,), None)
    return Bundle(folder, Manifest(SCHEMA_VERSION, "0", Source("safetensors", {}), model, graph, {}, {}, {}, files))


def test_opens_from_a_bundle_and_knows_its_bos(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(_bundle(tmp_path, _llama().to_str().encode()))
    assert tokenizer.encode("<s>a") == tokenizer.encode("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no tokenizer.json in the bundle"), (b"{", "not a tokenizer"), (b"\xff\xfe", "not a tokenizer")],
)
def test_names_a_missing_or_garbled_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tokenizer.open(_bundle(tmp_path, content))
