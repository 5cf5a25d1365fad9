"""Factors that are folded into what comes before a product leave what the layer computes as it was."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from galerne.export.calibrate.fold import Fold, bounded, divide, fold_of
from galerne.export.calibrate.layers import LayerRun, Layers
from galerne.export.calibrate.rounded import RoundedWeight, round_weight
from galerne.export.calibrate.source import LayerWeights
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.families.registry import read_spec
from galerne.export.parity.streamed import StreamedModel
from galerne.optimize.quantize.recipe import WeightFormat

FAMILIES = ["mistral", "llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rounded_before", [False, True])
def test_a_layer_computes_what_it_did(family: str, rounded_before: bool, family_of: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(0)
    checkpoint = open_checkpoint(family_of(family))
    spec = read_spec(checkpoint.config, "config")
    weights = LayerWeights(checkpoint, tied=spec.tie_word_embeddings)
    layers = Layers(StreamedModel(checkpoint, substitute=weights))
    hidden = np.stack([layers.embed(rng.integers(3, 2000, 30)) for _ in range(2)])
    weights.enter(0)
    rounded: dict[str, RoundedWeight] = {}
    groups, prefix = layers.groups(0, hidden[0]), "model.layers.0."
    if rounded_before:  # as a product is by the time that its rows are divided
        for name in (f"{prefix}{product}.weight" for group in groups for product in group.products):
            made = round_weight(name, weights(name).numpy(), WeightFormat("int4", 32), "nearest", None, "here")
            rounded[name] = made
            weights.replace(name, torch.from_numpy(made.dequantized()))
    expected = [layers.run(0, states) for states in hidden]
    run, folded = LayerRun(layers, 0, hidden, lambda _, shape: np.empty(shape, np.float32)), 0
    for group in groups:
        width = {x.shape[1] for x in run.inputs(group)}.pop()
        fold = fold_of(group, spec)
        assert fold is not None
        if rounded_before and fold.norm is not None:  # weights that are multiplied before they are rounded
            continue
        folded += 1
        places = rng.uniform(0.4, 2.5, width // fold.readers).astype(np.float32)
        of_places = bounded(places, fold, prefix, rounded)
        assert of_places.max() > 2
        divide(of_places, fold, prefix, spec, weights, rounded)
        factors = fold.by_channel(of_places)
        run.divide(group, factors)
        for name in (f"{prefix}{product}.weight" for product in group.products):
            weights.replace(name, weights(name) * torch.from_numpy(factors))
    assert folded == 4 - (2 if rounded_before else 0)
    kept = list(run.outputs())  # from the kept activations
    run.close()
    whole = [layers.run(0, states) for states in hidden]
    # Scales that were divided are rounded to float16 anew.
    tolerance = 3e-3 if rounded_before else 1e-4
    for found in (kept, whole):
        assert (
            max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) < tolerance * np.abs(expected).max()
        )


def test_factors_are_bounded_where_scales_would_become_too_small() -> None:
    made = RoundedWeight("int4", np.ones((2, 4), np.int8), np.array([[1e-4], [1.0]], np.float16), 4)
    fold = Fold(None, "self_attn.v_proj")
    found = bounded(np.array([1000, 1000], np.float32), fold, "x.", {"x.self_attn.v_proj.weight": made})
    assert found[0] < 2
    assert found[1] == 1000
    assert made.divided(0, found).scales.min() >= np.finfo(np.float16).tiny


def test_channels_that_read_one_place() -> None:
    """Two values of width 3, each read by two heads: the largest of both decides, and both get its factor."""
    fold = Fold(None, "self_attn.v_proj", 0, 2, 3)
    channels = np.arange(12, dtype=np.float32)
    assert fold.by_place(channels[None]).tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    places = fold.by_place(channels[None]).max(axis=0)
    assert fold.by_channel(places).tolist() == [3, 4, 5, 3, 4, 5, 9, 10, 11, 9, 10, 11]
