"""What `manifest.json` holds: the promises of a bundle, as typed records.

The manifest is the bundle's only index: a file that it does not list is not part of the bundle.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from galerne import schema

SCHEMA_VERSION = 1

Dialect = Literal["opset24", "primitive"]
FloatType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class FileEntry:
    """A file's hex SHA-256 and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Source:
    """The checkpoint that a bundle was made from.

    format: "safetensors" or "gguf".
    files: the checkpoint's files by name, weights and config alike.
    """

    format: str
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class ModelFacts:
    """What a caller needs to know of the model. `sliding_window` is null where every key is seen."""

    architecture: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int | None
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class GraphFacts:
    """The graph's side of the contract.

    compute_type: of activations and of the cache.
    chunk: the most tokens of one run, S.
    capacity: the ring's full size C in slots: window + chunk, or without a window the longest context.
    max_context: the longest sequence in tokens; null with a window, where there is no limit.
    """

    dialect: Dialect
    opset: int
    compute_type: FloatType
    chunk: int
    capacity: int
    max_context: int | None


@dataclass(frozen=True)
class Verdict:
    """Whether the bundle, run one way, matched its PyTorch source.

    report: the file under reports/ with every case, by its path in the bundle.
    """

    passed: bool
    report: str


@dataclass(frozen=True)
class Manifest:
    """The whole of `manifest.json`.

    recipe: the quantization recipe, resolved, as its TOML file reads.
    tools: versions of what made the bundle.
    parity: the verdict for each way of running it: "portable" or an engine's name.
    files: every other file of the bundle by its path in it, with / between folders.
    """

    schema_version: int
    galerne_version: str
    source: Source
    model: ModelFacts
    graph: GraphFacts
    recipe: dict[str, Any]
    tools: dict[str, str]
    parity: dict[str, Verdict] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the manifest as UTF-8 JSON; the same manifest gives the same bytes."""
        return schema.to_json(self)


def parse(data: bytes, where: str) -> Manifest:
    """Read a manifest.

    Raises: InputError if it is no JSON, of another schema version, or a field is missing, unknown or of the wrong type.
    """
    return schema.read_json(
        Manifest, data, where, SCHEMA_VERSION, "export the bundle again with this version of Galerne"
    )
