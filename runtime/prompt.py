"""The prompt as the caller gives it, and the tokens it becomes."""

from dataclasses import dataclass
from pathlib import Path

from galerne.errors import InputError
from galerne.runtime.bundle import Bundle
from galerne.runtime.chat import ChatTemplate
from galerne.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """Exactly one of: text, a UTF-8 file, token ids as in "1,2,3", or a chat message."""

    text: str | None = None
    file: Path | None = None
    ids: str | None = None
    chat: str | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            options = {"text": "--prompt", "file": "--prompt-file", "ids": "--prompt-ids", "chat": "--chat"}
            found = " and ".join(options[name] for name in given) or "none"
            raise InputError(f"prompt: expected one of {', '.join(options.values())}; found {found}")


def prompt_tokens(bundle: Bundle, prompt: Prompt) -> list[int]:
    """Return the tokens of a prompt.

    Raises: InputError if it is empty, not UTF-8, not a list of ids of the vocabulary, or the bundle lacks the tokenizer or
        the chat template that it takes.
    """
    if prompt.ids is not None:
        return _parsed(prompt.ids, bundle.manifest.model.vocab_size)
    if prompt.chat is not None:
        return _encoded(bundle, _rendered(bundle, prompt.chat), "--chat", special=False)
    if prompt.file is not None:
        return _encoded(bundle, _read(prompt.file), f"--prompt-file {prompt.file}", special=True)
    assert prompt.text is not None
    return _encoded(bundle, prompt.text, "--prompt", special=True)


def _parsed(text: str, vocab_size: int) -> list[int]:
    ids = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise InputError(f"--prompt-ids: expected whole numbers with commas between, found {part.strip()!r}")
        ids.append(int(part))
        if ids[-1] >= vocab_size:
            raise InputError(f"--prompt-ids: {ids[-1]} is out of the vocabulary; expected 0 to {vocab_size - 1}")
    return ids


def _rendered(bundle: Bundle, message: str) -> str:
    if not message:
        raise InputError("--chat: empty; expected a message")
    template = ChatTemplate.open(bundle)
    if template is None:
        raise InputError(f"{bundle.path}: has no chat template; use --prompt")
    return template.render([{"role": "user", "content": message}])


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as exc:
        raise InputError(f"--prompt-file {path}: not UTF-8 at byte {exc.start}") from exc
    except OSError as exc:
        raise InputError(f"--prompt-file {path}: {exc.strerror}") from exc


def _encoded(bundle: Bundle, text: str, where: str, *, special: bool) -> list[int]:
    if not text:
        raise InputError(f"{where}: empty; expected text")
    try:
        text.encode()
    except UnicodeEncodeError as exc:  # bytes of the command line that are not UTF-8 arrive as lone surrogates
        raise InputError(f"{where}: not UTF-8 at character {exc.start}") from exc
    ids = Tokenizer.open(bundle).encode(text, special=special)
    if not ids:
        raise InputError(f"{where}: gives no tokens; expected text")
    return ids
