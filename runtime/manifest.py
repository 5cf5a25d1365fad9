"""What `manifest.json` holds: the promises of a bundle, as typed records.

The manifest is the bundle's only index: a file that it does not list is not part of the bundle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from galerne import schema
from galerne.errors import InputError

SCHEMA_VERSION = 2

Dialect = Literal["opset24", "primitive"]
FloatType = Literal["float32", "float16", "bfloat16"]
# What keys and values are rounded to, where they are not kept as they are computed.
CacheType = Literal["int8"]


def layer_kinds(layer_windows: Sequence[int | None]) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """Return the kinds of layers and each layer's kind. Each kind has rings of its own size.

    Returns: the windows, each once, in the order of the layers; and for each layer the index of its window in them.
    """
    windows = tuple(dict.fromkeys(layer_windows))
    return windows, tuple(windows.index(window) for window in layer_windows)


def write_index_names(kinds: int) -> tuple[str, ...]:
    """Return the graph's inputs that say in which slot a run begins, one for each kind of layer."""
    return tuple(f"write_indices.{kind}" if kind else "write_indices" for kind in range(kinds))


def adapter_input_names(slot: str) -> tuple[str, str]:
    """Return the graph's inputs of an adapter slot: A [in, rank] and B [rank, out]."""
    return f"adapters.{slot}.A", f"adapters.{slot}.B"


def cache_names(prefix: str, num_hidden_layers: int) -> tuple[str, ...]:
    """Return the names of the rings, keys and values by turns: `past_key_values.0.key`, …"""
    return tuple(f"{prefix}.{i}.{part}" for i in range(num_hidden_layers) for part in ("key", "value"))


@dataclass(frozen=True)
class FileEntry:
    """A file's hex SHA-256 and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Source:
    """The checkpoint that a bundle was made from.

    format: "safetensors", "consolidated" (Mistral's own layout) or "gguf".
    files: the checkpoint's files by name, weights and config alike.
    """

    format: str
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class ModelFacts:
    """What a caller needs to know of the model.

    layer_windows: for each layer the number of newest positions that a query sees, itself included; null where it sees all.
    num_experts: MLPs of each layer, all of which run; 0 for a single one.
    fused_projections: whether the checkpoint has q, k, v in one weight, and gate and up in another.
    """

    architecture: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    layer_windows: tuple[int | None, ...]
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    num_experts: int = field(default=0, metadata=schema.LATER)
    fused_projections: bool = field(default=False, metadata=schema.LATER)


@dataclass(frozen=True)
class AdapterSlot:
    """A product x W of the graph that adds (x A) B, with A and B inputs of the graph.

    in_features: of x.
    modules: the checkpoint's linear layers whose weights are side by side in W.
    out_features: of each of them.
    """

    in_features: int
    modules: tuple[str, ...]
    out_features: tuple[int, ...]


@dataclass(frozen=True)
class GraphFacts:
    """The graph's side of the contract.

    compute_type: of activations.
    chunk: the most tokens of one run, S.
    capacities: the ring's full size C in slots for each kind of layer (`layer_kinds`): window + chunk, or without a
        window the longest context.
    max_context: the longest sequence in tokens; null if every layer has a window, where there is no limit.
    adapter_slots: by the product's name, as in `model.layers.0.self_attn.qkv_proj`; absent where the graph has none.
    rounded_cache: what the rings are rounded to; absent where they have the compute type.
    """

    dialect: Dialect
    opset: int
    compute_type: FloatType
    chunk: int
    capacities: tuple[int, ...]
    max_context: int | None
    adapter_slots: dict[str, AdapterSlot] = field(default_factory=dict, metadata=schema.LATER)
    rounded_cache: CacheType | None = field(default=None, metadata=schema.LATER)

    @property
    def ring_type(self) -> FloatType | CacheType:
        """The type of the portable graph's rings."""
        return self.rounded_cache or self.compute_type


@dataclass(frozen=True)
class Verdict:
    """Whether the bundle, run one way, passed a check against its PyTorch source.

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
    quality: likewise, whether what the recipe costs on text was within the limits; absent where it was not measured.
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
    quality: dict[str, Verdict] = field(default_factory=dict, metadata=schema.LATER)

    def to_json(self) -> bytes:
        """Return the manifest as UTF-8 JSON; the same manifest gives the same bytes."""
        return schema.to_json(self)


def parse(data: bytes, where: str) -> Manifest:
    """Read a manifest.

    Raises: InputError if it is no JSON, of another schema version, or a field is missing, unknown or of the wrong type.
    """
    manifest = schema.read_json(
        Manifest, data, where, SCHEMA_VERSION, "export the bundle again with this version of Galerne"
    )
    model, graph = manifest.model, manifest.graph
    for name, values, expected in (
        ("model: layer_windows", model.layer_windows, model.num_hidden_layers),
        ("graph: capacities", graph.capacities, len(layer_kinds(model.layer_windows)[0])),
    ):
        if len(values) != expected:
            raise InputError(f"{where}: {name}: expected {expected} of them, found {len(values)}")
    for name, slot in graph.adapter_slots.items():
        if len(slot.modules) != len(slot.out_features):
            raise InputError(
                f"{where}: graph: adapter_slots.{name}: out_features: expected {len(slot.modules)} of them, found "
                f"{len(slot.out_features)}"
            )
    return manifest
