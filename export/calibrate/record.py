"""What a quantized folder says of how it was made: `galerne.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galerne import schema
from galerne.files import read_file
from galerne.optimize.quantize.recipe import Recipe, WeightFormat
from galerne.runtime.manifest import Source

RECORD = "galerne.json"
RECORD_VERSION = 1


@dataclass(frozen=True)
class TextFacts:
    """The calibration text: its file's name and hash, and what was taken of it."""

    name: str
    sha256: str
    tokens: int
    length: int


@dataclass(frozen=True)
class Record:
    """How a folder was quantized. Two runs with the same record write the same weights.

    recipe: its name, or its file's; resolved: the recipe as its TOML file reads.
    source: the checkpoint that was quantized.
    """

    schema_version: int
    galerne_version: str
    recipe: str
    resolved: dict[str, Any]
    source: Source
    text: TextFacts

    @property
    def table(self) -> WeightFormat | None:
        """What the recipe stores the embedding table in; None for its compute type."""
        return schema.read(Recipe, self.resolved, f"{RECORD}: resolved").embed_tokens

    def summary(self) -> str:
        """Return a line for the manifest of a bundle."""
        return f"{self.recipe}, calibrated on {self.text.tokens} tokens of {self.text.name}"


def read_record(folder: Path) -> Record | None:
    """Return the record of a folder that Galerne quantized; None if there is none. Raises: InputError if it is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return None
    return schema.read_json(Record, read_file(path), str(path), RECORD_VERSION, "quantize again, or remove the file")
