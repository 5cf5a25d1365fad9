"""The way from a checkpoint to a quantized one: what is checked, the record, and the folder that can be gone on from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import galerne
from galerne import schema
from galerne.errors import InputError
from galerne.export.calibrate.folder import QuantizedFolder
from galerne.export.calibrate.record import RECORD, RECORD_VERSION, Record, TextFacts
from galerne.export.calibrate.source import check_finite
from galerne.export.calibrate.stream import Stream
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.export import check_tensors, config_name
from galerne.export.facts import model_facts
from galerne.export.families.registry import read_spec
from galerne.export.text import Int64, checkpoint_tokenizer, sequences
from galerne.files import check_destination, resumable_folder, sha256_file
from galerne.optimize.quantize.recipe import Calibration, Recipe, check_overrides
from galerne.progress import say, step
from galerne.runtime.bundle import entry_of
from galerne.runtime.footprint import weight_names
from galerne.runtime.manifest import Source

_OPTION = "--calibration"


def quantize(
    checkpoint: Checkpoint,
    recipe: Recipe,
    name: str,
    text: Path,
    out: Path,
    *,
    tokens: int | None = None,
    length: int | None = None,
) -> Path:
    """Write a checkpoint whose weights a recipe has rounded, in the compressed-tensors format.

    Layers pass one at a time: in memory are one layer's weights and what rounding one of them takes. Activations lie in mapped
    files of a folder beside `out`, where a run that was stopped goes on.

    Args:
        name: of the recipe, for the record.
        text: what to calibrate on, UTF-8.
        out: the folder, which must not exist. It appears whole.
        tokens, length: in place of the recipe's: in all, and of a sequence.
    Returns: `out`.
    Raises: InputError if the recipe needs no text, the text is unfit (see `sequences`), the model is not supported, a block does
        not divide, a weight is not finite, or `out` exists.
    """
    if recipe.calibration is None:
        raise InputError(
            f"--recipe {name}: needs no text; galerne export {checkpoint.path} --recipe {name} --out BUNDLE rounds by it at once"
        )
    if checkpoint.quantization is not None:
        raise InputError(
            f"{checkpoint.path}: quantized already with {checkpoint.quantization}; give the original checkpoint"
        )
    check_destination(out)  # before the text and the source are read
    spec = read_spec(checkpoint.config, config_name(checkpoint))
    check_tensors(spec, checkpoint)
    check_overrides(recipe, weight_names(model_facts(spec)), str(checkpoint.path))
    calibration = replace(
        recipe.calibration,
        tokens=recipe.calibration.tokens if tokens is None else tokens,
        length=recipe.calibration.length if length is None else length,
    )
    recipe = replace(recipe, calibration=calibration)
    ids = _calibration_ids(checkpoint, text, calibration, spec.bos_token_id, spec.context_limit)
    stream = Stream(checkpoint, recipe, spec, ids)
    check_finite(checkpoint)
    with step("hash source"):
        source = Source(checkpoint.format, {file.name: entry_of(file) for file in checkpoint.files()})
    facts = TextFacts(text.name, sha256_file(text), ids.size, ids.shape[1])
    record = Record(RECORD_VERSION, galerne.__version__, name, recipe.resolved(), source, facts)
    with resumable_folder(out, RECORD, schema.to_json(record)) as path:
        folder = QuantizedFolder(path, stream.count)
        if done := folder.layers_done():
            say(f"{path}: goes on after layer {done} of {stream.count}")
        try:
            stream.run(folder)
        except KeyboardInterrupt:
            say(f"{path}: holds {folder.layers_done()} of {stream.count} layers; the same command goes on from there")
            raise
        config = _config(checkpoint, untied="lm_head" in stream.schemes)
        folder.finish(config, stream.schemes, stream.ignored, recipe.cache, checkpoint.tokenizer_files())
    return out


def _config(checkpoint: Checkpoint, *, untied: bool) -> dict[str, Any]:
    """Return the checkpoint's config in float16: in bfloat16, as most sources are, transformers would round the scales."""
    config = {
        key: value for key, value in checkpoint.config.items() if key != "torch_dtype"
    }  # what dtype was called before
    return {**config, "dtype": "float16", **({"tie_word_embeddings": False} if untied else {})}


def _calibration_ids(
    checkpoint: Checkpoint, text: Path, calibration: Calibration, bos: int | None, limit: int | None
) -> Int64:
    tokens, length = calibration.tokens, calibration.length
    if not 2 <= length <= tokens:
        raise InputError(f"--length {length}: expected from 2 to --tokens, which is {tokens}")
    if limit is not None and length > limit:
        raise InputError(f"--length {length}: the model's longest context is {limit}")
    return sequences(checkpoint_tokenizer(checkpoint, bos), text, length, tokens, option=_OPTION, fewest=tokens)
