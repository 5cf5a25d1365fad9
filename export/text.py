"""Text for measuring and calibrating: read, checked, and cut into sequences of tokens."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.runtime.bundle import TOKENIZER
from galerne.runtime.tokenizer import Tokenizer

Int64 = npt.NDArray[np.int64]

# Fewer tokens than this say nothing of a distribution's tail.
FEWEST_TOKENS = 256


def checkpoint_tokenizer(checkpoint: Checkpoint, bos_token_id: int | None) -> Tokenizer:
    """Return a checkpoint's tokenizer. Raises: InputError if it has none, or one that cannot be read."""
    data = checkpoint.tokenizer_files().get(TOKENIZER)
    if data is None:
        raise InputError(f"{checkpoint.path}: no {TOKENIZER} in it, so text cannot be read")
    where = f"{checkpoint.path}: {TOKENIZER}: not a tokenizer"
    return Tokenizer.parse(data, bos_token_id, where, "save it again with the model")


def read_text(path: Path, option: str = "--text", fewest: int = FEWEST_TOKENS) -> str:
    """Return a file's text.

    Args:
        option: that named the file, for messages. fewest: how many tokens it should have, for messages.
    Raises: InputError if it cannot be read, is not UTF-8, or holds nothing but space.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InputError(f"{option} {path}: not UTF-8 at byte {exc.start}") from exc
    except OSError as exc:
        raise InputError(f"{option} {path}: {exc.strerror}") from exc
    if not text.strip():
        raise InputError(f"{option} {path}: empty; expected text of at least {fewest} tokens")
    return text


def sequences(
    tokenizer: Tokenizer,
    path: Path,
    length: int,
    tokens: int,
    *,
    option: str = "--text",
    fewest: int = FEWEST_TOKENS,
) -> Int64:
    """Cut a file's text into sequences of the same length, spread evenly over it, each with the BOS token where there is one.

    Args:
        length: of a sequence. Text of fewer tokens gives one shorter sequence.
        tokens: at most how many there are in all sequences together.
        option: that named the file, for messages.
        fewest: how many tokens the text must have.
    Returns: [sequences, length] int64.
    Raises: InputError as `read_text`, or if the text has fewer than `fewest` tokens.
    """
    ids = tokenizer.encode(read_text(path, option, fewest))
    if len(ids) < fewest:
        raise InputError(f"{option} {path}: {len(ids)} tokens; expected at least {fewest}")
    begins = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    body = np.array(ids[len(begins) :], np.int64)
    part = min(length - len(begins), len(body))
    count = max(1, min(len(body) // part, tokens // length))
    starts = np.linspace(0, len(body) - part, count).astype(np.int64)
    return np.stack([np.concatenate([np.array(begins, np.int64), body[start : start + part]]) for start in starts])
