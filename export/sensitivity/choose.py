"""Chooses a format for each group of a model's weights: within a limit, the mix that harms least."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.streamed import StreamedModel
from galerne.export.quality.distance import Distance
from galerne.export.sensitivity.groups import Group, groups_of, head_bytes, other_bytes, table_beside
from galerne.export.sensitivity.harm import measure_harms
from galerne.export.sensitivity.limits import Limit
from galerne.export.sensitivity.measured import Measure
from galerne.export.sensitivity.mixes import Mix, Option, mixes
from galerne.export.text import checkpoint_tokenizer, sequences
from galerne.optimize.quantize.recipe import Override, Recipe, WeightFormat
from galerne.progress import step
from galerne.runtime.footprint import HEAD
from galerne.runtime.manifest import ModelFacts

DEFAULT_TOKENS, DEFAULT_LENGTH = 2048, 256
# What weights may be stored in beside the compute type.
QUANTIZED = (WeightFormat("int8"), WeightFormat("int4", 32), WeightFormat("int4", 128))


@dataclass(frozen=True)
class Chosen:
    """A mix and how it came about.

    recipe: as its file will say it. groups: what got a format each, in the order of the mix's options.
    harms: of each group by format, in nats.
    weights_bytes: the most that `weights.bin` takes.
    predicted_kl: what the harms come to. measured: on text that the mix was not chosen by.
    tokens, held_out_tokens: how many the harms, and the mix, were measured on.
    """

    recipe: Recipe
    groups: tuple[Group, ...]
    harms: tuple[dict[WeightFormat, float], ...]
    mix: Mix
    weights_bytes: int
    predicted_kl: float
    measured: Distance
    tokens: int
    held_out_tokens: int


def check_base(checkpoint: Checkpoint, base: Recipe) -> None:
    """Raises: InputError if the checkpoint's weights, or the recipe's formats, leave nothing to choose."""
    if checkpoint.quantization is not None:
        raise InputError(
            f"{checkpoint.path}: quantized already with {checkpoint.quantization}, so there is nothing to choose"
        )
    if base.overrides:
        raise InputError("--recipe: has overrides itself; give one without, such as int4-rtn")
    if base.activations is not None:
        raise InputError(
            f"--recipe: activations: {base.activations}: only the rounding of weights is measured; give one without"
        )
    if base.compute != "float16":
        raise InputError(f"--recipe: compute: expected float16, as quantized weights need; found {base.compute}")


def choose(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    text: Path,
    base: Recipe,
    limit: Limit,
    *,
    tokens: int = DEFAULT_TOKENS,
    length: int = DEFAULT_LENGTH,
) -> Chosen:
    """Measure what each format does to each group of weights, and choose a mix within a limit.

    Every other sequence of the text is kept for measuring the mix that was chosen.

    Args:
        facts: the checkpoint's.
        base: how weights are rounded, and what else the recipe says; its formats do not count. Where it rounds by calibration,
            weights are rounded to nearest here, which is worse.
        tokens: to measure harms on, and as many again to measure the mix on. length: of one sequence.
    Raises: InputError if the text is unfit (see `sequences`), or as `check_base`; CheckFailed if no mix keeps to the limit.
    """
    check_base(checkpoint, base)
    if not 2 <= length <= tokens:
        raise InputError(f"--length {length}: expected from 2 to --tokens, which is {tokens}")
    tokenizer = checkpoint_tokenizer(checkpoint, facts.bos_token_id)
    fed = sequences(tokenizer, text, length, 2 * tokens, fewest=2 * length)
    groups = groups_of(facts)
    formats = [form for form in (WeightFormat(base.compute), *QUANTIZED) if limit.allows(form)]
    tied = facts.tie_word_embeddings
    bare = [_options(facts, group, formats, dict.fromkeys(formats, 0.0), base) for group in groups]
    smallest = Mix(tuple(min(options, key=lambda option: option.bytes) for options in bare))
    limit.check_narrowest(smallest, mixed(base, groups, smallest, tied=tied))
    streamed = StreamedModel(checkpoint)
    rounding = replace(base, calibration=None, method="nearest") if base.calibrated else base
    with step("sensitivity"):
        rounded = [form for form in formats if form.bits is not None]
        by_match = measure_harms(streamed, rounding, groups, rounded, fed[::2])
    # What the compute type does to a weight is not counted: it is hundreds of times less than int8.
    harms = [{WeightFormat(base.compute): 0.0, **by_match[group.match]} for group in groups]
    found = mixes([_options(facts, group, formats, each, base) for group, each in zip(groups, harms, strict=True)])
    with step("choose"):
        measure = Measure(streamed, fed[1::2])
        mix = limit.choose(found, lambda other: mixed(rounding, groups, other, tied=tied), measure)
        measured = measure.distance(mixed(rounding, groups, mix, tied=tied))
    recipe = mixed(base, groups, mix, tied=tied)
    kl = float(measured.kl.mean())
    how = " with weights rounded to nearest" if base.calibrated else ""
    measured_on = f"{measure.tokens} tokens of {text.name}{how}"
    description = f"{limit.says()}: formats by measured sensitivity, KL {kl:.3g} nats on {measured_on}"
    return Chosen(
        replace(recipe, description=description),
        tuple(groups),
        tuple(harms),
        mix,
        mix.bytes + other_bytes(facts, checkpoint, base.table),
        mix.harm,
        measured,
        fed[::2].size,
        measure.tokens,
    )


def mixed(base: Recipe, groups: Sequence[Group], mix: Mix, *, tied: bool) -> Recipe:
    """Return a recipe that stores each group in its format, with as few overrides as that takes.

    Args:
        tied: whether the vocabulary projection is the embedding's table, which then goes by the projection's format.
    """
    chosen = {group: option.format for group, option in zip(groups, mix.options, strict=True)}
    head = next(form for group, form in chosen.items() if group.layer is None)
    counts: Counter[WeightFormat] = Counter()
    for group, form in chosen.items():
        if group.layer is not None:
            counts[form] += group.count
    common = counts.most_common(1)[0][0]
    overrides = []
    for layer in dict.fromkeys(group.layer for group in groups if group.layer is not None):
        own = {group.match: form for group, form in chosen.items() if group.layer == layer}
        if len(set(own.values())) == 1:
            own = {f"model.layers.{layer}.*": next(iter(own.values()))}
        overrides += [Override(match, form) for match, form in own.items() if form != common]
    table = table_beside(head, base.table) if tied else base.table
    embed_tokens = None if table.bits is None else table
    made = replace(base, weights=common, lm_head=head, overrides=tuple(overrides), embed_tokens=embed_tokens)
    if tied and made.method == "gptq" and all(form.bits != 4 for form in made.formats):
        # GPTQ would give the projection a tensor of its own then, which the mix's size does not count.
        made = replace(made, method="nearest")
    if all(form.bits is None for form in made.formats):  # nothing is rounded, however it would be
        made = replace(made, method="nearest", calibration=None)
    return made


def _options(
    facts: ModelFacts, group: Group, formats: Sequence[WeightFormat], harms: dict[WeightFormat, float], base: Recipe
) -> list[Option]:
    def size(form: WeightFormat) -> int:
        return head_bytes(facts, group, form, base.table) if group.match == HEAD else group.stored_bytes(form)

    return [Option(form, size(form), harms[form]) for form in group.formats(formats)]
