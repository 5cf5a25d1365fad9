"""A Hugging Face folder: config.json and safetensors, in one file or in shards with an index."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint, DType
from galerne.export.checkpoint.safetensors_file import SafetensorsFile
from galerne.files import read_file, read_table

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_SENTENCEPIECE = ("tokenizer.model", "tokenizer.model.v3", "spiece.model")


class SafetensorsCheckpoint(Checkpoint):
    """A folder of safetensors. Every header is read and checked on opening; no weight is."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        """Open a folder. Raises: InputError naming the file that is missing or wrong."""
        self.path = path
        if not (path / CONFIG).is_file():
            raise InputError(
                f"{path}: no {CONFIG} in it; expected a checkpoint as Hugging Face's save_pretrained writes it"
            )
        self.config = read_table(path / CONFIG)
        self._weights: list[Path] = [path / WEIGHTS]
        if (path / WEIGHTS).is_file():
            file = SafetensorsFile(path / WEIGHTS)
            self._home = dict.fromkeys(file.entries, file)
        elif (path / INDEX).is_file():
            self._home = self._open_shards()
        else:
            raise InputError(_no_weights(path))
        self._shapes = {name: file.entries[name].shape for name, file in self._home.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the tensors' shapes by name."""
        return self._shapes

    def dtype(self, name: str) -> DType:
        """Return a tensor's type."""
        return self._file(name).dtype(name)

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor, always as a view of its file."""
        return self._file(name).read(name)

    def stored(self, name: str) -> NDArray[Any]:
        """Return a tensor of integers, float8 or floats as a view of its file."""
        return self._file(name).stored(name)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape as it is stored."""
        return self._file(name).entries[name].shape

    def where(self, name: str) -> str:
        """Return the file that holds a tensor, for messages."""
        return str(self._file(name).path)

    def release(self, name: str) -> None:
        """Drop a tensor's pages from the resident set."""
        self._file(name).release(name)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the tokenizer's files, as they are."""
        self._refuse_sentencepiece()
        return {file.name: read_file(file) for file in self._tokenizer_paths()}

    def files(self) -> list[Path]:
        """Return config, weights, index and tokenizer."""
        return [self.path / CONFIG, *self._weights, *self._tokenizer_paths()]

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._home:
            raise InputError(f"{self.path}: {name}: no such tensor in the checkpoint; it has {len(self._home)} others")
        return self._home[name]

    def _tokenizer_paths(self) -> list[Path]:
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]

    def _refuse_sentencepiece(self) -> None:
        for name in _SENTENCEPIECE:
            if (self.path / name).is_file() and not (self.path / TOKENIZER).is_file():
                raise InputError(
                    f"{self.path}: found {name} but no {TOKENIZER}; make one with transformers: "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                )

    def _open_shards(self) -> dict[str, SafetensorsFile]:
        index = self.path / INDEX
        weight_map = read_table(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: weight_map: expected a table of tensor and shard, found {weight_map!r}")
        shards: dict[str, SafetensorsFile] = {}
        home: dict[str, SafetensorsFile] = {}
        for name, shard in weight_map.items():
            # A name with a folder in it could lead out of the checkpoint.
            if not isinstance(shard, str) or Path(shard).name != shard or shard == "..":
                raise InputError(f"{index}: weight_map: {name!r}: expected a file's name, found {shard!r}")
            if shard not in shards:
                if not (self.path / shard).is_file():
                    raise InputError(
                        f"{self.path / shard}: no such shard, but {index} names it; download it into the folder"
                    )
                shards[shard] = SafetensorsFile(self.path / shard)
            if name not in shards[shard].entries:
                raise InputError(
                    f"{self.path / shard}: {name!r}: not in this shard, but {index} says so; download both files again"
                )
            home[name] = shards[shard]
        self._weights = [index, *(self.path / shard for shard in sorted(shards))]
        return home


def _no_weights(path: Path) -> str:
    if any(path.glob("pytorch_model*.bin")):
        return (
            f"{path}: found pytorch_model*.bin, a pickle, which Galerne never loads since it can run code; "
            "convert it to safetensors with transformers' from_pretrained and save_pretrained"
        )
    return f"{path}: no weights in it; expected {WEIGHTS}, or {INDEX} and its shards"
