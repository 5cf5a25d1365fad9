"""Text is cut into sequences of a checkpoint's tokens, and what is no text is refused in one line."""

from pathlib import Path

import numpy as np
import pytest

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.text import checkpoint_tokenizer, read_text, sequences
from galerne.runtime.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny-mistral"
HELD_OUT = TINY / "held-out.txt"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The example's."""
    checkpoint = open_checkpoint(TINY)
    return checkpoint_tokenizer(checkpoint, checkpoint.config["bos_token_id"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty; expected text of at least 256 tokens"),
        (b" \n\t\n", "empty; expected text"),
        (b"caf\xe9", "not UTF-8 at byte 3"),
        (b"too short", r"\d+ tokens; expected at least 256"),
    ],
)
def test_unfit_text_is_refused(tokenizer: Tokenizer, tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(data)
    with pytest.raises(InputError, match=f"--text .*text.txt: {message}"):
        sequences(tokenizer, file, 64, 512)


def test_a_missing_file_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--text .*none.txt: No such file"):
        sequences(tokenizer, tmp_path / "none.txt", 64, 512)


def test_sequences_begin_with_bos_and_lie_in_the_text(tokenizer: Tokenizer) -> None:
    cut = sequences(tokenizer, HELD_OUT, 64, 500)
    ids = np.array(tokenizer.encode(read_text(HELD_OUT)))
    assert cut.shape == (500 // 64, 64)
    assert (cut[:, 0] == tokenizer.bos_token_id).all()
    assert (cut[0] == ids[:64]).all()
    assert (cut[-1, 1:] == ids[-63:]).all()  # to the text's end, not only its beginning


def test_short_text_is_one_sequence(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(HELD_OUT.read_text()[:1200])
    ids = tokenizer.encode(file.read_text())
    assert sequences(tokenizer, file, 5000, 10_000).tolist() == [ids]
