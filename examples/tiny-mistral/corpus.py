"""The text: Python's standard library, split by module, and a byte-level BPE tokenizer trained on the train side."""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2, as in Mistral's own vocabulary
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages"}
# Not code: the 8-bit codec tables, and the language reference dumped into one string.
SKIPPED_PACKAGES = {"encodings", "pydoc_data"}
# Generated when Python is built; they name the builder's own folders.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-3")
HELD_OUT_EVERY = 20
HELD_OUT_FILE_BYTES = 200_000


def _is_skipped(path: Path) -> bool:
    """Whether a path relative to the library's root is left out of both sides."""
    package = path.parts[0]
    return (
        bool(SKIPPED_FOLDERS.intersection(path.parts))
        or package in SKIPPED_PACKAGES
        or package.startswith(SKIPPED_PREFIXES)
    )


def _is_held_out(path: Path) -> bool:
    """Whether a module is held out. Decided by its top-level name, so that a package is on one side whole."""
    return int(hashlib.sha256(path.parts[0].encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0


def read_modules() -> tuple[list[str], list[str]]:
    """Read the running Python's standard library.

    Returns: (train, held out), each the source texts of its modules, in path order.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(file.relative_to(root) for file in root.rglob("*.py")):
        if not _is_skipped(path):
            text = (root / path).read_text(encoding="utf-8", errors="replace")
            if text.strip():
                (held_out if _is_held_out(path) else train).append(text)
    return train, held_out


def held_out_text(held_out: list[str]) -> str:
    """Join whole held-out modules, in path order, while they fit in HELD_OUT_FILE_BYTES."""
    text = ""
    for module in held_out:
        if len((text + module).encode()) > HELD_OUT_FILE_BYTES:
            break
        text += module
    return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose `encode` puts one <s> in front."""
    bpe = Tokenizer(models.BPE(unk_token=UNK))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[UNK, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=UNK, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Encode documents into one stream, each as <s> text </s>. Returns: [tokens] int64."""
    stream: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return torch.tensor(stream)


def to_rows(stream: torch.Tensor, length: int, bos_token_id: int) -> torch.Tensor:
    """Cut a stream [tokens] into rows that each begin with <s>, as every prompt does. The rest of the stream is dropped.

    Returns: [tokens // (length - 1), length] int64.
    """
    body = stream[: len(stream) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat([body.new_full((len(body), 1), bos_token_id), body], dim=1)
