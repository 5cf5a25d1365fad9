"""Which recipe a checkpoint goes by: the caller's, or what it was quantized to before."""

from collections import Counter
from typing import Any, cast

from galerne.errors import InputError
from galerne.export.calibrate.record import read_record
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.packed import InputKind, PackedTensor
from galerne.export.checkpoint.quantized_folder import QuantizedCheckpoint
from galerne.optimize.quantize.recipe import (
    PRECISIONS,
    AnyRecipe,
    CheckpointRecipe,
    Recipe,
    StoredFormat,
    StoredOverride,
    load,
)
from galerne.runtime.footprint import HEAD, is_router


def choose_recipe(checkpoint: Checkpoint, precision: str | None, recipe: str | None) -> AnyRecipe:
    """Return the recipe for a checkpoint: what it was quantized to, or else what was asked for, or else fp16.

    Raises: InputError if both were asked for, there is no such recipe, it needs calibration text, or the checkpoint is quantized
        and one was asked for.
    """
    if precision is not None and recipe is not None:
        raise InputError("--precision and --recipe: give one of them")
    if isinstance(checkpoint, QuantizedCheckpoint):
        if precision is not None or recipe is not None:
            asked = f"--precision {precision}" if precision is not None else f"--recipe {recipe}"
            raise InputError(
                f"{checkpoint.path}: quantized already with {checkpoint.quantization}, and kept as it is; leave {asked} out"
            )
        return checkpoint_recipe(checkpoint)
    chosen = load(recipe if recipe is not None else PRECISIONS[precision or "fp16"])
    if chosen.calibrated:
        raise InputError(
            f"--recipe {recipe}: needs calibration text: galerne quantize {checkpoint.path} --recipe {recipe} --calibration TEXT "
            "--out FOLDER, then galerne export FOLDER --out BUNDLE"
        )
    return chosen


def check_recipe(checkpoint: Checkpoint, recipe: AnyRecipe) -> None:
    """Raises: InputError if the recipe would round weights that were rounded before, keep what is not there, or needs text."""
    if (checkpoint.quantization is not None) != isinstance(recipe, CheckpointRecipe):
        raise InputError(
            f"{checkpoint.path}: {checkpoint.quantization or 'not quantized'}: the recipe is for another checkpoint"
        )
    if isinstance(recipe, Recipe) and recipe.calibrated:
        raise InputError(
            f"{checkpoint.path}: the recipe needs calibration text: galerne quantize, and then export what it makes"
        )


def checkpoint_recipe(checkpoint: QuantizedCheckpoint) -> CheckpointRecipe:
    """Return the recipe that keeps a checkpoint's weights as they are. What is not quantized goes into float16.

    Every scale and zero point is read, so what cannot be kept shows before anything is written.

    Raises: InputError if a weight is stored in a way that cannot be kept.
    """
    forms: Counter[StoredFormat] = Counter()
    stored = {name: StoredFormat("float16") for name in _products(checkpoint)}
    inputs: Counter[InputKind] = Counter()
    head = StoredFormat("float16")
    for name in checkpoint.parts:
        packed = checkpoint.packed(name)
        assert packed is not None
        form = stored_format(packed)
        if packed.input_kind is not None:
            inputs[packed.input_kind] += 1
        if name == HEAD:
            head = form
        else:
            forms[form] += packed.shape[0] * packed.shape[1]
            stored[name] = form
        checkpoint.release(name)
    cache = next((scales.kind for scales in checkpoint.cache_scales().values()), None)
    if not forms and cache is None:
        raise InputError(
            f"{checkpoint.path}: no weight of a layer is quantized, but config.json says {checkpoint.quantization}"
        )
    weights = forms.most_common(1)[0][0] if forms else StoredFormat("float16")
    where = f"in blocks of {weights.block_size}" if weights.block_size else "by output channel"
    parts = [f"{weights.dtype} {where}"] if forms else []
    parts += [*(["some otherwise"] if len(forms) > 1 else []), "the rest float16" if forms else "weights in float16"]
    if cache is not None:
        parts.append(f"keys and values in {cache} by tensor")
    activations = inputs.most_common(1)[0][0] if inputs else None
    if activations is not None:
        most = "inputs" if sum(inputs.values()) == len(checkpoint.parts) else "some inputs"
        parts.append(f"{most} in {activations} by tensor")
    note = f"; {checkpoint.note}" if checkpoint.note else ""
    record = read_record(checkpoint.path)
    by = "" if record is None else f"{record.summary()}: "
    return CheckpointRecipe(
        f"{by}as the checkpoint has it: {checkpoint.quantization}, {', '.join(parts)}{note}",
        "float16",
        weights,
        head,
        activations=activations,
        overrides=tuple(StoredOverride(name, form) for name, form in sorted(stored.items()) if form != weights),
        # The folder holds the table as its source did; the recipe that made it may have it rounded.
        embed_tokens=None if record is None else record.table,
        cache=cache,
    )


def _products(checkpoint: QuantizedCheckpoint) -> list[str]:
    """Return the names of the layers' linear weights."""
    return [
        name
        for name, shape in checkpoint.shapes().items()
        if len(shape) == 2 and name.startswith("model.layers.") and name.endswith(".weight") and not is_router(name)
    ]


def stored_format(packed: PackedTensor) -> StoredFormat:
    """Return what a weight is stored in: unsigned where it has zero points."""
    dtype = packed.kind if packed.zero_points is None else f"u{packed.kind}"
    return StoredFormat(cast(Any, dtype), packed.block)
