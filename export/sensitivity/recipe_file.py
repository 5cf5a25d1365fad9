"""Writes a chosen mix as a recipe file that a person can read, keep and change."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from galerne import schema
from galerne.export.sensitivity.choose import Chosen
from galerne.optimize.quantize.recipe import Override, Recipe, WeightFormat


def recipe_toml(chosen: Chosen) -> str:
    """Return a recipe as TOML, with what was measured in comments."""
    kl, agrees = float(chosen.measured.kl.mean()), float(chosen.measured.agrees.mean())
    lines = [
        "# Written by `galerne recipe`. Change what you like: the first override that matches a weight holds.",
        f"# On {chosen.held_out_tokens} tokens that it was not chosen by: KL(source, rounded) {kl:.3g} nats, "
        f"the same likeliest token at {agrees:.2%}.",
        f"# The harms of single groups, measured on {chosen.tokens} tokens, come to {chosen.predicted_kl:.3g} nats.",
        f"# weights.bin: {chosen.weights_bytes / 1e6:.6g} MB.",
        *recipe_lines(chosen.recipe, _harms(chosen)),
    ]
    return "\n".join(lines) + "\n"


def recipe_lines(recipe: Recipe, comment: Callable[[Override], str] | None = None) -> list[str]:
    """Return a recipe as the lines of its TOML file.

    Args:
        comment: what to say of an override.
    """
    tree = recipe.resolved()
    overrides = tree.pop("overrides", [])
    lines = [f"{key} = {_value(value)}" for key, value in tree.items()]
    for override, said in zip(overrides, recipe.overrides, strict=True):
        lines += ["", "[[overrides]]", f"match = {_value(override['match'])}", f"format = {_value(override['format'])}"]
        if comment is not None:
            lines[-1] += f"  # {comment(said)}"
    return lines


def label(form: WeightFormat) -> str:
    """Name a format for a person."""
    return form.dtype if form.block_size is None else f"{form.dtype} in blocks of {form.block_size}"


def _harms(chosen: Chosen) -> Callable[[Override], str]:
    def say(override: Override) -> str:
        matched = [
            harms
            for group, harms in zip(chosen.groups, chosen.harms, strict=True)
            if override.match in (group.match, f"model.layers.{group.layer}.*")
        ]
        common = chosen.recipe.weights
        own, else_ = (sum(harms[form] for harms in matched if form in harms) for form in (override.format, common))
        return f"{own:.2g} nats; {else_:.2g} as {label(common)}"

    return say


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items() if item is not None) + " }"
    return json.dumps(schema.tree(value), ensure_ascii=False)  # strings and numbers are alike in TOML
