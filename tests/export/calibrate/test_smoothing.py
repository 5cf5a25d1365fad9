"""SmoothQuant on a model with outlier channels: it saves what rounding inputs would lose, and changes nothing in floats."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from galerne.export.calibrate.fold import divide, fold_of
from galerne.export.calibrate.layers import LayerRun, Layers
from galerne.export.calibrate.quantize import quantize
from galerne.export.calibrate.source import LayerWeights, layer_prefix
from galerne.export.calibrate.statistics import Statistics
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.families.registry import read_spec
from galerne.export.parity.streamed import StreamedModel
from galerne.optimize.quantize import recipe
from galerne.optimize.quantize.smooth import smooth_factors
from galerne.runtime.measures import kl

TINY = Path(__file__).parents[3] / "examples" / "tiny-mistral"
IDS = np.random.default_rng(7).integers(3, 2000, 200)
# How much larger some channels are made, about as in language models of some billion weights.
LARGER, CHANNELS = 40, [5, 77, 130]


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-mistral with some channels after each norm made larger, which the weights that read them undo."""
    folder = tmp_path_factory.mktemp("outliers") / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.txt", "*.md", "*.safetensors"))
    tensors = {name: tensor.float() for name, tensor in load_file(TINY / "model.safetensors").items()}
    for number in range(open_checkpoint(TINY).config["num_hidden_layers"]):
        prefix = layer_prefix(number)
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"{prefix}{norm}.weight"][CHANNELS] *= LARGER
            for reader in readers:
                tensors[f"{prefix}{reader}.weight"][:, CHANNELS] /= LARGER
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _logits(folder: Path) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = StreamedModel(open_checkpoint(folder)).model(torch.from_numpy(IDS[None])).logits[0].numpy()
    return found


def _lost(source: Path, folder: Path, smoothing: str) -> float:
    """Return the mean KL from a source of what int8 weights and inputs make of it."""
    path = folder / "recipe.toml"
    path.write_text(
        f'description = "inputs in int8"\ncompute = "float16"\nactivations = "int8"\n{smoothing}'
        'weights = { dtype = "int8" }\nlm_head = { dtype = "int8" }\nwide_inputs = ["*.down_proj.weight"]\n'
        "calibration = { tokens = 1024, length = 128 }\n"
    )
    text = TINY / "held-out.txt"
    out = quantize(open_checkpoint(source), recipe.load(str(path)), "w8a8", text, folder / "made")
    return kl(_logits(source), _logits(out))


def test_smoothing_saves_what_outlier_channels_cost(outliers: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "smooth").mkdir()
    plain = _lost(outliers, tmp_path / "plain", "")
    smooth = _lost(outliers, tmp_path / "smooth", "smoothing = 0.8\n")
    assert plain > 0.02
    assert smooth < plain / 10
    assert smooth < 3e-3


def test_smoothing_changes_nothing_in_floats(outliers: Path) -> None:
    checkpoint = open_checkpoint(outliers)
    spec = read_spec(checkpoint.config, "config")
    assert spec.num_attention_heads > spec.num_key_value_heads  # so that heads share values
    weights = LayerWeights(checkpoint, tied=spec.tie_word_embeddings)
    layers = Layers(StreamedModel(checkpoint, substitute=weights))
    hidden = layers.embed(IDS)[None]
    for number in range(len(layers.modules)):
        weights.enter(number)
        expected, folded = layers.run(number, hidden[0]), 0
        run = LayerRun(layers, number, hidden, lambda _, shape: np.empty(shape, np.float32))
        for group in layers.groups(number, hidden[0]):
            names = [f"{layer_prefix(number)}{product}.weight" for product in group.products]
            (x,) = run.inputs(group)
            statistics = Statistics(x.shape[1], hessian=False)
            statistics.add(x)
            fold = fold_of(group, spec)
            assert fold is not None
            factors = smooth_factors(
                [fold.by_place(weights(name).numpy()) for name in names],
                fold.by_place(statistics.max_abs[None]).max(axis=0),
                0.8,
            )
            assert factors.max() / factors.min() > 1.5
            divide(factors, fold, layer_prefix(number), spec, weights, {})
            run.divide(group, fold.by_channel(factors))
            for name in names:
                weights.replace(name, weights(name) * torch.from_numpy(fold.by_channel(factors)))
            folded += 1
        run.close()
        assert folded == 4
        found = layers.run(number, hidden[0])
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
        hidden = expected[None]
