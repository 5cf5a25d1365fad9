"""Mistral's tekken.json as the tokenizer.json that the runtime reads."""

import json
import tempfile
from pathlib import Path

from galerne.errors import InputError, one_line
from galerne.files import read_file

TEKKEN = "tekken.json"
_BOS, _EOS = "<s>", "</s>"
# The control tokens of files that do not list their own (Mistral-Nemo's), by id. Source: mistral-common, tekken.py.
_FIRST_CONTROL_TOKENS = (
    *("<unk>", _BOS, _EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *(
        "[/TOOL_RESULTS]",
        "[TOOL_CALLS]",
        "[IMG]",
        "<pad>",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[PREFIX]",
        "[MIDDLE]",
        "[SUFFIX]",
    ),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def convert_tekken(path: Path) -> dict[str, bytes]:
    """Convert through transformers, and have a plain prompt begin with the BOS token, as mistral-common's does.

    Returns: tokenizer.json and tokenizer_config.json.
    Raises: InputError if the file cannot be converted.
    """
    from tokenizers import processors
    from transformers.integrations.mistral.tokenizer import MistralConverter

    data = read_file(path)
    try:
        table = json.loads(data)
        if table.get("special_tokens") is None:
            table["special_tokens"] = [
                {"rank": rank, "token_str": token, "is_control": True}
                for rank, token in enumerate(_FIRST_CONTROL_TOKENS)
            ]
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / TEKKEN
            whole.write_text(json.dumps(table), encoding="utf-8")
            tokenizer = MistralConverter(str(whole)).converted()
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
                ),
            ]
        )
    except Exception as exc:
        raise InputError(f"{path}: transformers cannot convert it ({type(exc).__name__}: {one_line(exc)})") from exc
    config = {"bos_token": _BOS, "eos_token": _EOS}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
