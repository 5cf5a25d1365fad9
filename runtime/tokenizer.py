"""Text to token ids and back, from the bundle's `tokenizer.json`, and the stream that shows tokens as they come.

The `tokenizers` library does the work. Its own `DecodeStream` is not used: it raises "Invalid prefix" when a run of
byte-fallback tokens turns out not to be UTF-8, and it has no end at which to give out what it still holds.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import tokenizers

from galerne.errors import InputError
from galerne.runtime.bundle import TOKENIZER, Bundle

_BYTE_TOKEN = re.compile(r"<0x(?:[0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class TokenStream(Protocol):
    """Turns ids that come one at a time into text. All pieces joined equal `Tokenizer.decode` of all ids."""

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that became certain, often one word, sometimes nothing."""

    def finish(self) -> str:
        """Return what was held back. An unfinished character comes out as U+FFFD, as in `Tokenizer.decode`."""


class Tokenizer:
    """A model's tokenizer.

    bos_token_id: the model's token that begins a text; None where it has none.
    """

    def __init__(self, library: tokenizers.Tokenizer, bos_token_id: int | None = None) -> None:
        """Wrap a tokenizer of the library.

        Args:
            library: loaded; its padding and truncation are switched off here.
            bos_token_id: the model's, to keep it from coming twice.
        """
        library.no_padding()
        library.no_truncation()
        self._library = library
        self.bos_token_id = bos_token_id
        self._vocabulary = _Vocabulary(library)

    @staticmethod
    def open(bundle: Bundle) -> "Tokenizer":
        """Load the tokenizer of a bundle.

        Raises: InputError if the bundle has no tokenizer.json or it cannot be read.
        """
        path = bundle.file(TOKENIZER)
        if TOKENIZER not in bundle.manifest.files:
            raise InputError(f"{bundle.path}: no {TOKENIZER} in the bundle, so text cannot be read; pass --prompt-ids")
        bos = bundle.manifest.model.bos_token_id
        return Tokenizer.parse(path.read_bytes(), bos, f"{path}: not a tokenizer", "export the bundle again")

    @staticmethod
    def parse(data: bytes, bos_token_id: int | None, complaint: str, remedy: str) -> "Tokenizer":
        """Read a `tokenizer.json`.

        Args:
            complaint, remedy: what an error says before and after the library's own words.
        Raises: InputError if it cannot be read.
        """
        try:
            library = tokenizers.Tokenizer.from_buffer(data)
        except Exception as exc:  # the library raises plain Exception
            raise InputError(f"{complaint} ({exc}); {remedy}") from exc
        return Tokenizer(library, bos_token_id)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Turn text into ids.

        Args:
            text: special tokens written out in it become their ids.
            special: whether the tokenizer adds what it adds to a plain prompt, such as the BOS token. Off for a
                rendered chat template, which brings its own. A BOS is not added to a text that begins with one.
        Raises: InputError if the text is not valid Unicode.
        """
        try:
            encoding = self._library.encode(text, add_special_tokens=special)
        except (UnicodeEncodeError, TypeError) as exc:
            raise InputError("the text is not valid Unicode; pass it as UTF-8") from exc
        ids = list(encoding.ids)
        # The mask is 1 for what the tokenizer added, 0 for what stood in the text.
        if encoding.special_tokens_mask[:2] == [1, 0] and ids[0] == ids[1] == self.bos_token_id:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turn ids into text. Ids beyond the tokenizer's vocabulary (a padded model's) give no text."""
        return str(self._library.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self) -> TokenStream:
        """Return a stream for one generation, equal to `decode` with special tokens skipped.

        A decoder whose text of one token may hang on the whole sequence (WordPiece and the like) cannot be streamed:
        its text comes out whole at `finish`.
        """
        steps = _decoder_steps(self._library.decoder)
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return _ByteLevelStream(self._vocabulary)
        if _is_local(steps) and self._vocabulary.anchor is not None:
            return _PieceStream(self._vocabulary, any(step["type"] == "ByteFallback" for step in steps))
        return _WholeStream(self._vocabulary)


class _Vocabulary:
    """What single tokens stand for, looked up once each and kept for every later stream."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._library = library
        added = library.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self.bytes: dict[int, bytes] = {}
        self.pieces: dict[int, str] = {}
        self.anchor = next((i for i in range(library.get_vocab_size()) if self._can_anchor(i)), None)
        self._anchor_length = 0 if self.anchor is None else len(self.text([self.anchor]))

    def token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it; None for one that gives no text."""
        token = self._library.id_to_token(token_id)
        return None if token is None or token in self._special else str(token)

    def text(self, ids: Iterable[int]) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=True))

    def continuation(self, ids: Iterable[int]) -> str:
        """Return the text of ids that do not begin the sequence, where decoders strip no leading space."""
        assert self.anchor is not None
        return self.text([self.anchor, *ids])[self._anchor_length :]

    def _can_anchor(self, token_id: int) -> bool:
        token = self.token(token_id)
        return token is not None and not _BYTE_TOKEN.fullmatch(token) and bool(self.text([token_id]))


class _ByteLevelStream:
    """For byte-level BPE: each token is a few bytes of UTF-8, whatever stands around it."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        data = self._vocabulary.bytes.get(token_id)
        if data is None:
            token = self._vocabulary.token(token_id)
            data = b"" if token is None else _token_bytes(token)
            self._vocabulary.bytes[token_id] = data
        return self._utf8.decode(data)

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class _PieceStream:
    """For SentencePiece-like vocabularies: a token has its own text, but at the start and in a run of byte tokens.

    At the start the decoder strips a space. A run of byte tokens reads as UTF-8 only if all of it is valid, and as one
    U+FFFD for each byte if not, so nothing of it is certain before the run ends.
    """

    def __init__(self, vocabulary: _Vocabulary, byte_fallback: bool) -> None:
        self._vocabulary = vocabulary
        self._byte_fallback = byte_fallback
        self._started = False  # whether any text has come out
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        piece = None if self._held or not self._started else self._vocabulary.pieces.get(token_id)
        if piece is not None:
            return piece
        token = self._vocabulary.token(token_id)
        if token is None:
            return ""
        self._held.append(token_id)
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(token):
            return ""
        alone = self._started and len(self._held) == 1
        text = self.finish()
        if alone:
            self._vocabulary.pieces[token_id] = text
        return text

    def finish(self) -> str:
        text = self._vocabulary.continuation(self._held) if self._started else self._vocabulary.text(self._held)
        # A lone space is stripped, and that it was counts for what follows: hold it until there is text.
        if text or self._started:
            self._started = True
            self._held.clear()
        return text


class _WholeStream:
    """For any other decoder: the text is certain only when all ids are there."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def finish(self) -> str:
        text = self._vocabulary.text(self._ids)
        self._ids.clear()
        return text


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """Return the decoder's description, as in tokenizer.json, as a flat list of steps; empty where there is none."""
    if decoder is None:
        return []
    # The state that the library pickles is the decoder's JSON: no need to parse the whole tokenizer.json again.
    tree: dict[str, Any] = json.loads(decoder.__getstate__())
    return tree["decoders"] if tree["type"] == "Sequence" else [tree]


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Whether a token's text hangs on nothing but the token, its run of byte tokens, and whether it comes first."""
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Strip":
            if step["content"] != " " or step["stop"] != 0:
                return False
        elif kind == "Replace":
            if step["pattern"] != {"String": "▁"}:
                return False
        elif kind not in ("ByteFallback", "Metaspace") or fused:
            return False
    return True


def _byte_values() -> dict[str, int]:
    """Return GPT-2's table from the character that stands for a byte in a byte-level vocabulary to the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_VALUES = _byte_values()


def _token_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token. One with a character outside of the table stands for itself, as UTF-8."""
    if all(character in _BYTE_VALUES for character in token):
        return bytes(_BYTE_VALUES[character] for character in token)
    return token.encode()
