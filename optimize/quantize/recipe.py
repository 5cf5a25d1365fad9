"""Quantization recipes: which type each weight is stored in. A recipe is one TOML file."""

import fnmatch
import importlib.resources
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from galerne import schema
from galerne.errors import InputError
from galerne.runtime.footprint import BLOCK_SIZES, HEAD, choose_form
from galerne.runtime.manifest import CacheType, FloatType

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = importlib.resources.files("galerne.optimize.recipes")
# What `--precision` stands for: the plain recipe of each type.
PRECISIONS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8", "int4": "int4-rtn"}

# nearest: the smallest scale that clips nothing. search: the scale with the least error of the weights, no text needed.
Method = Literal["nearest", "search", "gptq", "awq"]
# What inputs of products are rounded to.
Rounded = Literal["int8", "float8e4m3fn"]


@dataclass(frozen=True)
class StoredFormat:
    """How a product's weight is stored, by whoever quantized it.

    block_size: how many weights along the input axis share a scale; None for floats and for one scale for an output channel.
    """

    dtype: Literal["float32", "float16", "bfloat16", "int8", "int4", "uint8", "uint4", "float8e4m3fn"]
    block_size: int | None = None

    @property
    def bits(self) -> int | None:
        """Bits of a quantized weight; None for a float of 16 or 32 bits."""
        return {"int8": 8, "int4": 4, "uint8": 8, "uint4": 4, "float8e4m3fn": 8}.get(self.dtype)


@dataclass(frozen=True)
class WeightFormat(StoredFormat):
    """How a recipe stores a product's weight.

    block_size: int4 only: how many weights along the input axis share a scale. int8 has one scale for an output channel.
    """

    dtype: Literal["float32", "float16", "bfloat16", "int8", "int4", "float8e4m3fn"]
    block_size: Literal[256, 128, 64, 32] | None = None

    def block_for(self, in_features: int, name: str) -> int:
        """Return how many weights along the input axis share a scale.

        Raises: InputError if no block size divides the axis.
        """
        if self.block_size is None:
            return in_features
        for size in BLOCK_SIZES:
            if size <= self.block_size and in_features % size == 0:
                return size
        raise InputError(
            f"{name}: its input axis of {in_features} is divided by none of the int4 blocks "
            f"{', '.join(map(str, BLOCK_SIZES))}; give it int8, as the recipe int8 or an override does"
        )


@dataclass(frozen=True)
class Override:
    """Another format for some weights.

    match: a pattern over a weight's name in the checkpoint, as in "model.layers.0.*.down_proj.weight"; *, ? and [] as in a shell.
    """

    match: str
    format: WeightFormat


@dataclass(frozen=True)
class Calibration:
    """How much text a recipe is calibrated on.

    tokens: in all. length: of one sequence.
    """

    tokens: int = 16384
    length: int = 512


@dataclass(frozen=True)
class Recipe:
    """A recipe as its TOML file reads.

    compute: the type of activations and, unless it is rounded, of the ring.
    lm_head: the format of the vocabulary projection, which is more sensitive than the rest.
    embed_tokens: the format of the embedding table: int8, one scale for a token's row, or the compute type, as where it is
        absent. A table that is the vocabulary projection too is stored once where both have one format.
    method: how weights are rounded.
    overrides: other formats for some weights; the first that matches holds.
    activations: what the inputs of quantized products are rounded to, with one scale a tensor from calibration; absent for none.
    wide_inputs: patterns, as an override's, of weights whose products take their input as it is all the same.
    smoothing: SmoothQuant's alpha, from 0 to 1: how much of an input's range goes over to the weights; absent for none.
    calibration: how much text; absent where a recipe needs none.
    cache: what keys and values are rounded to in the ring, with one scale for each layer's keys and one for its values, from
        calibration; absent for the compute type.
    """

    description: str
    compute: FloatType
    weights: WeightFormat
    lm_head: WeightFormat
    method: Method = field(default="nearest", metadata=schema.LATER)
    overrides: tuple[Override, ...] = field(default=(), metadata=schema.LATER)
    activations: Rounded | None = field(default=None, metadata=schema.LATER)
    smoothing: float | None = field(default=None, metadata=schema.LATER)
    calibration: Calibration | None = field(default=None, metadata=schema.LATER)
    wide_inputs: tuple[str, ...] = field(default=(), metadata=schema.LATER)
    embed_tokens: WeightFormat | None = field(default=None, metadata=schema.LATER)
    cache: CacheType | None = field(default=None, metadata=schema.LATER)

    @property
    def calibrated(self) -> bool:
        """Whether its weights depend on text, so that a checkpoint is quantized before it is exported."""
        return self.calibration is not None

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """All formats that it names."""
        return self.weights, self.lm_head, *(override.format for override in self.overrides)

    @property
    def table(self) -> WeightFormat:
        """The embedding table's format."""
        return self.embed_tokens or WeightFormat(self.compute)

    def format_for(self, weight: str) -> WeightFormat:
        """Return the format of a linear weight by its name in the checkpoint; see `choose_form`."""
        overrides = ((override.match, override.format) for override in self.overrides)
        return choose_form(weight, overrides, self.lm_head, self.weights, WeightFormat(self.compute))

    def inputs_of(self, weight: str) -> Rounded | None:
        """Return what the input of a weight's product is rounded to, by the weight's name in the checkpoint; None for nothing.

        The vocabulary projection's never is.
        """
        wide = weight == HEAD or any(fnmatch.fnmatchcase(weight, pattern) for pattern in self.wide_inputs)
        return None if wide else self.activations

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as its TOML file reads, for the manifest."""
        return {key: value for key, value in schema.tree(self).items() if key != "method" or value != "nearest"}


@dataclass(frozen=True)
class StoredOverride:
    """What a weight is stored in that is not stored as most are. match: its name in the checkpoint."""

    match: str
    format: StoredFormat


@dataclass(frozen=True)
class CheckpointRecipe:
    """What stands in place of a recipe where the checkpoint was quantized before: its weights are kept as they are.

    compute: as in a recipe; what the checkpoint has not quantized is stored in it.
    weights, lm_head: what most of the weights, and the vocabulary projection, are stored in.
    activations: what the inputs of products are rounded to, by scales in the checkpoint; absent where none is.
    overrides: the weights of layers that are stored otherwise; absent for none.
    embed_tokens: the format of the embedding table, which is rounded to nearest where it is not the compute type, as where it is
        absent.
    cache: as in a recipe, by scales in the checkpoint.
    """

    description: str
    compute: FloatType
    weights: StoredFormat
    lm_head: StoredFormat
    method: Literal["checkpoint"] = "checkpoint"
    activations: Rounded | None = field(default=None, metadata=schema.LATER)
    overrides: tuple[StoredOverride, ...] = field(default=(), metadata=schema.LATER)
    embed_tokens: WeightFormat | None = field(default=None, metadata=schema.LATER)
    cache: CacheType | None = field(default=None, metadata=schema.LATER)

    @property
    def formats(self) -> tuple[StoredFormat, ...]:
        """The formats that it names."""
        return self.weights, self.lm_head, *(override.format for override in self.overrides)

    @property
    def table(self) -> WeightFormat:
        """The embedding table's format."""
        return self.embed_tokens or WeightFormat(self.compute)

    def format_for(self, weight: str) -> WeightFormat:
        """Return the format of a linear weight that the checkpoint has not quantized."""
        return WeightFormat(self.compute)

    def resolved(self) -> dict[str, Any]:
        """Return the recipe for the manifest."""
        tree: dict[str, Any] = schema.tree(self)
        return tree


AnyRecipe = Recipe | CheckpointRecipe


def check_overrides(recipe: AnyRecipe, weights: Collection[str], where: str) -> None:
    """Hold a recipe's patterns against a model.

    Args:
        weights: the names of its linear weights. where: what to call the model.
    Raises: InputError if an override matches none of them, or no pattern of `wide_inputs` does.
    """
    if not isinstance(recipe, Recipe):
        return
    overrides = [("overrides", (override.match,)) for override in recipe.overrides]
    # Families name the same product differently, so that one recipe for several has a pattern for each.
    for key, patterns in (*overrides, *([("wide_inputs", recipe.wide_inputs)] if recipe.wide_inputs else [])):
        if not any(fnmatch.filter(weights, pattern) for pattern in patterns):
            named = " or ".join(map(repr, patterns))
            raise InputError(f"{key}: {named} matches no weight of {where}; its weights are named as in {min(weights)}")


def read_resolved(tree: dict[str, Any], where: str) -> AnyRecipe:
    """Read the recipe of a manifest. Raises: InputError if a key is missing, unknown or of the wrong type."""
    if tree.get("method") == "checkpoint":
        return schema.read(CheckpointRecipe, tree, where)
    return schema.read(Recipe, tree, where)


def names() -> list[str]:
    """Return the names of the recipes that ship."""
    return sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml"))


def load(name: str) -> Recipe:
    """Load a recipe by its name or by the path of a TOML file.

    Raises: InputError if there is none of that name, a key is missing, unknown or of the wrong type, or two do not go together.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"{name}: no such recipe file")
        data = path.read_bytes()
    elif name in names():
        data = (_FOLDER / f"{name}.toml").read_bytes()
    else:
        raise InputError(f"recipe {name!r}: unknown; there are {', '.join(names())}, or the path of a .toml file")
    try:
        tree = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise InputError(f"{name}: not TOML ({exc})") from exc
    recipe = schema.read(Recipe, tree, name)
    for number, override in enumerate(recipe.overrides):
        if not override.match:
            raise InputError(f"{name}: overrides[{number}]: match: expected a pattern over names of weights, found ''")
    if not all(recipe.wide_inputs):
        raise InputError(f"{name}: wide_inputs: expected patterns over names of weights, found ''")
    keys = ["weights", "lm_head", *(f"overrides[{i}]: format" for i in range(len(recipe.overrides)))]
    for key, form in zip(keys, recipe.formats, strict=True):
        _check_format(f"{name}: {key}", form, recipe)
        if form.bits is not None and recipe.compute != "float16":
            raise InputError(f"{name}: compute: expected float16 with quantized weights, found {recipe.compute}")
    if recipe.table not in (WeightFormat(recipe.compute), WeightFormat("int8")):
        raise InputError(
            f"{name}: embed_tokens: expected dtype int8 or {recipe.compute} as in compute; found {recipe.table}"
        )
    if recipe.table.bits is not None and recipe.compute != "float16":
        raise InputError(f"{name}: compute: expected float16 with a quantized table, found {recipe.compute}")
    _check_method(name, recipe)
    return recipe


def _check_format(where: str, form: WeightFormat, recipe: Recipe) -> None:
    if (form.dtype == "int4") != (form.block_size is not None):
        raise InputError(f"{where}: block_size goes with dtype int4, and int4 needs one; found {form}")
    if form.bits is None and form.dtype != recipe.compute:
        raise InputError(f"{where}: dtype: expected {recipe.compute} as in compute, int8 or int4; found {form.dtype}")
    if form.dtype == "float8e4m3fn" and not recipe.calibrated:
        raise InputError(f"{where}: dtype: float8e4m3fn needs a [calibration], as it is written by galerne quantize")


def _check_method(name: str, recipe: Recipe) -> None:
    """Hold what a recipe rounds against what it says of how."""
    if recipe.method != "nearest" and not any(form.dtype in ("int4", "int8") for form in recipe.formats):
        raise InputError(
            f"{name}: method: {recipe.method} rounds int4 or int8; found weights in {recipe.weights.dtype}"
        )
    if recipe.activations is not None and recipe.weights.bits is None:
        raise InputError(f"{name}: activations: expected quantized weights beside them, found {recipe.weights.dtype}")
    if recipe.wide_inputs and recipe.activations is None:
        raise InputError(f"{name}: wide_inputs: leaves out rounded activations, but there are none")
    if recipe.smoothing is not None and recipe.activations is None:
        raise InputError(
            f"{name}: smoothing: moves range from rounded activations to weights, but there are no activations"
        )
    if recipe.smoothing is not None and not 0 <= recipe.smoothing <= 1:
        raise InputError(f"{name}: smoothing: expected 0 to 1, found {recipe.smoothing}")
    if recipe.cache is not None and recipe.compute != "float16":
        raise InputError(f"{name}: compute: expected float16 with a rounded cache, found {recipe.compute}")
    text = recipe.calibration
    if text is None:
        for key, value in (("method", recipe.method), ("activations", recipe.activations), ("cache", recipe.cache)):
            if value not in (None, "nearest", "search"):
                raise InputError(f"{name}: {key}: {value} needs a table [calibration], even an empty one")
    elif not 2 <= text.length <= text.tokens:
        raise InputError(
            f"{name}: calibration: expected 2 <= length <= tokens, found length {text.length} and tokens {text.tokens}"
        )
