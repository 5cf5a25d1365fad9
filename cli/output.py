"""What the subcommands share: their options' forms, and the way to stdout."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from galerne.errors import InputError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)]
CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A folder with safetensors, Hugging Face's or Mistral's own, or a .gguf file.",
        show_default=False,
    ),
]
SourcePath = Annotated[
    Path,
    typer.Option(
        "--source", metavar="CHECKPOINT", help="The checkpoint that the bundle was made from.", show_default=False
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="FOLDER", help="A LoRA adapter, as peft saves it, merged into the checkpoint."),
]
RunAdapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="A LoRA adapter, as peft saves it, for a bundle exported with --adapter-slots.",
    ),
]
Stack = Annotated[
    str | None,
    typer.Option("--stack", metavar="NAME", help="Which of the target's software stacks; the first by default."),
]
Threads = Annotated[int | None, typer.Option(help="Threads of ONNX Runtime; one for each core by default.", min=1)]


def emit(as_json: bool, data: dict[str, Any] | list[Any], text: str) -> None:
    """Print a result: the data as one line of JSON, or the text."""
    print(json.dumps(data) if as_json else text)
    sys.stdout.flush()


def table(rows: list[list[str]]) -> str:
    """Lay rows out in columns, the first row being the heads; columns of figures stand to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [all(_is_figure(row[i]) for row in rows[1:]) for i in range(len(widths))]
    lines = [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _is_figure(cell: str) -> bool:
    return cell in ("", "-") or cell[0].isdigit()


def size(count: float) -> str:
    """Write a number of bytes for a person."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def parse_bytes(option: str, text: str) -> int:
    """Read an option's number of bytes: plain, or with a unit of 1000 (kB, MB, GB) or of 1024 (KiB, MiB, GiB).

    Raises: InputError if it is none.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise InputError(f"{option}: expected a number of bytes such as 6GB, 6GiB or 6000000000, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])
