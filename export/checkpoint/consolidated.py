"""Mistral's own layout: params.json, consolidated.safetensors in one file or several, and tekken.json."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint, DType
from galerne.export.checkpoint.mistral_params import compose_config, hugging_face_names
from galerne.export.checkpoint.rotary import halves_apart
from galerne.export.checkpoint.safetensors_file import SafetensorsFile
from galerne.export.checkpoint.safetensors_folder import TOKENIZER, TOKENIZER_FILES
from galerne.export.checkpoint.tekken import TEKKEN, convert_tekken
from galerne.files import read_file, read_table

PARAMS, WEIGHTS = "params.json", "consolidated*.safetensors"
_SHARD = re.compile(r"(\d+)-of-(\d+)")
_SENTENCEPIECE = "tokenizer.model*"


class ConsolidatedCheckpoint(Checkpoint):
    """A folder as Mistral publishes it. Every header is read and checked on opening; no weight is."""

    format = "consolidated"

    def __init__(self, path: Path) -> None:
        """Open a folder. Raises: InputError naming the file that is missing or wrong."""
        self.path = path
        self._weights = sorted(path.glob(WEIGHTS))
        self._check_shards()
        self._home: dict[str, SafetensorsFile] = {}
        for file in map(SafetensorsFile, self._weights):
            for name in file.entries:
                if name in self._home:
                    raise InputError(
                        f"{file.path}: {name!r}: also in {self._home[name].path.name}; files that each hold a part of a "
                        "tensor are not supported"
                    )
                self._home[name] = file
        self._names = hugging_face_names(self._home, path)
        tied = "lm_head.weight" not in self._names
        self.config = compose_config(read_table(path / PARAMS), str(path / PARAMS), tied=tied)
        self._shapes = {name: self._home[stored].entries[stored].shape for name, stored in self._names.items()}
        self._heads = {
            ".q_proj.": int(self.config["num_attention_heads"]),
            ".k_proj.": int(self.config["num_key_value_heads"]),
        }
        for name, shape in self._shapes.items():
            heads = self._heads_of(name)
            if heads and (heads < 1 or shape[0] % (2 * heads)):
                raise InputError(
                    f"{path}: {self._names[name]}: {shape[0]} rows do not divide into {heads} heads of an even size"
                )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the tensors' shapes by Hugging Face's names."""
        return self._shapes

    def dtype(self, name: str) -> DType:
        """Return a tensor's type."""
        stored = self._stored(name)
        return self._home[stored].dtype(stored)

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor; queries and keys in Hugging Face's order of a head, which takes a copy."""
        stored = self._stored(name)
        values = self._home[stored].read(stored)
        heads = self._heads_of(name)
        return halves_apart(values, heads) if heads else values

    def release(self, name: str) -> None:
        """Drop a tensor's pages from the resident set."""
        stored = self._stored(name)
        self._home[stored].release(stored)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return tokenizer.json and its companions, made from tekken.json where there is no tokenizer.json."""
        files = {name: read_file(self.path / name) for name in TOKENIZER_FILES if (self.path / name).is_file()}
        if TOKENIZER in files:
            return files
        if (self.path / TEKKEN).is_file():
            return convert_tekken(self.path / TEKKEN) | files
        if found := sorted(self.path.glob(_SENTENCEPIECE)):
            raise InputError(
                f"{self.path}: found {found[0].name} but neither {TEKKEN} nor {TOKENIZER}; put the {TOKENIZER} of the model's "
                "Hugging Face files beside it"
            )
        return files

    def files(self) -> list[Path]:
        """Return params, weights and tokenizer."""
        names = [name for name in (*TOKENIZER_FILES, TEKKEN) if (self.path / name).is_file()]
        return [self.path / PARAMS, *self._weights, *(self.path / name for name in names)]

    def _stored(self, name: str) -> str:
        if name not in self._names:
            raise InputError(f"{self.path}: {name}: no such tensor in the checkpoint; it has {len(self._names)} others")
        return self._names[name]

    def _heads_of(self, name: str) -> int:
        return next((heads for part, heads in self._heads.items() if part in name), 0)

    def _check_shards(self) -> None:
        """Hold the numbers in the files' names, as in consolidated-00001-of-00002, against the files there are."""
        shards = [match for file in self._weights if (match := _SHARD.search(file.name))]
        counts = {int(match[2]) for match in shards}
        if shards and (len(counts) != 1 or len(shards) != len(self._weights) or len(shards) not in counts):
            raise InputError(
                f"{self.path}: {WEIGHTS}: found {len(self._weights)} files of {' or '.join(map(str, sorted(counts)))}; "
                "download the others into the folder"
            )


def is_consolidated(path: Path) -> bool:
    """Whether a folder has Mistral's own layout."""
    return (path / PARAMS).is_file() and next(path.glob(WEIGHTS), None) is not None
