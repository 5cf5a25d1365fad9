"""Every recipe there is, from weights to logits: what a bundle stores against numpy, what it computes against PyTorch.

Recipes are found by their files, so one that is added is held to this too. The references read the recipe's own TOML and know
nothing of the code that rounds: numpy for the weights, bit for bit; for the logits transformers' model with those weights and
with the inputs of products rounded where the recipe says so.
"""

import fnmatch
import os
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from benchmarks.graph_feeds import feeds
from galerne.export.calibrate.quantize import quantize
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.prequantized import choose_recipe
from galerne.optimize.lower.widen import widen
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.ort import session_options
from galerne.runtime.model import Model

ROOT = Path(__file__).parents[2]
# Where a text brings a value onto a tie of its rounding, sums in another order round it the other way: here none does.
TEXT = ROOT / "benchmarks" / "texts" / "held-out.txt"
RECIPES = {
    path.stem: tomllib.loads(path.read_text()) for path in sorted((ROOT / "optimize" / "recipes").glob("*.toml"))
}
CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 16,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
EMBEDDING = "model.embed_tokens.weight"
IDS = np.random.default_rng(0).integers(3, 2000, 40).tolist()
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEVELS = {"int4": (-8, 7), "int8": (-127, 127)}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

Float32 = NDArray[np.float32]
Weights = dict[str, Float32]


@dataclass(frozen=True)
class Made:
    """A recipe's bundle, and what it was made of: the quantized folder too, where the recipe needs text."""

    tree: dict[str, Any]
    source: dict[str, Tensor]
    folder: dict[str, Tensor] | None
    bundle: Bundle


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral whose axes blocks of 128 divide and do not, its norms random too."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.mul_(torch.exp(0.5 * torch.randn_like(parameter)))
    folder = tmp_path_factory.mktemp("round-trip") / "source"
    model.save_pretrained(folder)
    shutil.copy(ROOT / "examples" / "tiny-mistral" / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def made_by(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Return what a recipe makes of the model; made once."""
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            folder, own, checkpoint, tensors = (
                tmp_path_factory.mktemp(name),
                recipe.load(name),
                open_checkpoint(source),
                None,
            )
            if "calibration" in RECIPES[name]:
                out = quantize(checkpoint, own, name, TEXT, folder / "quantized", tokens=256, length=32)
                checkpoint = open_checkpoint(out)
                tensors = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
            chosen = own if tensors is None else choose_recipe(checkpoint, None, None)
            bundle = export(checkpoint, chosen, folder / "bundle", chunk=8)
            made[name] = Made(RECIPES[name], load_file(source / "model.safetensors"), tensors, bundle)
        return made[name]

    return get


def products(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.endswith("_proj.weight") or name == "lm_head.weight"]


def form_of(name: str, tree: dict[str, Any]) -> dict[str, Any]:
    assert "overrides" not in tree, "a recipe that ships with overrides: say here what they mean"
    form: dict[str, Any] = tree["lm_head" if name == "lm_head.weight" else "weights"]
    return form


def rounded(weight: Float32, form: dict[str, Any], method: str) -> Float32:
    """Return a weight [out, in] as a recipe without text stores it, widened again."""
    if form["dtype"] in FLOATS:
        return torch.from_numpy(weight).to(FLOATS[form["dtype"]]).float().numpy()
    if form["dtype"] == "float8e4m3fn":
        scale = (np.abs(weight).max(axis=1, keepdims=True) / 448).astype(np.float16).astype(np.float32)
        eights: Float32 = np.clip(weight / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        return eights
    low, high = LEVELS[form["dtype"]]
    block = weight.shape[1]
    if form["dtype"] == "int4":
        block = next(size for size in (256, 128, 64, 32) if size <= form["block_size"] and weight.shape[1] % size == 0)
    blocks = weight.reshape(-1, block)
    smallest = np.maximum(blocks.max(axis=1) / np.float32(high), blocks.min(axis=1) / np.float32(low)).astype(
        np.float16
    )
    factors = (
        np.linspace(1, 0.7, 13, dtype=np.float32) if (method, form["dtype"]) == ("search", "int4") else [np.float32(1)]
    )
    best, least = blocks, np.full(len(blocks), np.inf)
    for factor in factors:  # of the scale; the one with the least sum of the errors' third powers
        scale = (smallest.astype(np.float32) * factor).astype(np.float16).astype(np.float32)[:, None]
        tried = np.clip(np.rint(blocks * (1 / scale)), low, high) * scale
        error = (np.abs(blocks.astype(np.float64) - tried) ** 3).sum(axis=1)
        best = np.where((error < least)[:, None], tried, best)
        least = np.minimum(least, error)
    result: Float32 = best.reshape(weight.shape) + 0  # an integer has no negative zero
    return result


def unpacked(tensors: dict[str, Tensor], module: str) -> Float32:
    """Return a weight [out, in] of a compressed-tensors folder."""
    scale = tensors[f"{module}.weight_scale"].float().numpy()
    if f"{module}.weight_packed" in tensors:  # eight codes in a word, the first in the low bits, less 8
        words = tensors[f"{module}.weight_packed"].numpy().view(np.uint32)
        codes = np.stack([(words >> np.uint32(4 * place)) & np.uint32(15) for place in range(8)], axis=-1)
        out_features, in_features = tensors[f"{module}.weight_shape"].tolist()
        values = codes.reshape(out_features, -1)[:, :in_features].astype(np.float32) - 8
    else:
        values = tensors[f"{module}.weight"].float().numpy()
    weight: Float32 = values * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)
    return weight


def reference(made: Made) -> Weights:
    """Return the products' weights [out, in], and the embedding table."""
    form = made.tree.get("embed_tokens", {"dtype": made.tree["compute"]})
    table = {EMBEDDING: rounded(made.source[EMBEDDING].float().numpy(), form, "nearest")}
    return table | _products(made)


def _products(made: Made) -> Weights:
    if made.folder is not None:
        return {name: unpacked(made.folder, name.removesuffix(".weight")) for name in products(made.source)}
    method = made.tree.get("method", "nearest")
    return {
        name: rounded(made.source[name].float().numpy(), form_of(name, made.tree), method)
        for name in products(made.source)
    }


def stored(made: Made) -> Weights:
    """Return the products' weights as the bundle's initializers have them, [out, in]."""
    graph = onnx.load(str(made.bundle.file(GRAPH)), load_external_data=False).graph
    arrays = {t.name: numpy_helper.to_array(t, str(made.bundle.path)) for t in graph.initializer}
    weights: Weights = {}
    for name, array in arrays.items():
        plain, columns = name.removesuffix("_quantized"), array.astype(np.float32)
        module, _, kind = plain.rpartition(".")
        if kind != "weight" or not module.endswith(("_proj", "lm_head", "embed_tokens")):
            continue
        if plain == EMBEDDING:  # lies as it is, a scale for each row
            weights[plain] = (
                columns if plain == name else columns * arrays[f"{plain}_scale"].astype(np.float32)[:, None]
            )
            continue
        if plain != name:
            scale = arrays[f"{plain}_scale"].astype(np.float32)
            columns *= scale if scale.ndim == 1 else np.repeat(scale, len(columns) // len(scale), axis=0)
        prefix, _, last = module.rpartition(".")
        parts = [f"{prefix}.{part}.weight".lstrip(".") for part in FUSED.get(last, (last,))]
        sizes = np.cumsum([len(made.source[part]) for part in parts])
        weights |= dict(zip(parts, np.split(columns.T, sizes[:-1]), strict=True))
    return weights


def same_bits(found: Float32, expected: Float32) -> bool:
    return np.array_equal(np.ascontiguousarray(found).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@pytest.mark.parametrize("name", RECIPES)
def test_stored_weights_are_numpys_bit_for_bit(name: str, made_by: Callable[[str], Made]) -> None:
    made = made_by(name)
    found, expected = stored(made), reference(made)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not same_bits(found[key], expected[key])] == []


@pytest.mark.parametrize("name", [name for name, tree in RECIPES.items() if "calibration" in tree])
def test_what_text_does_not_move_is_rounded_to_nearest(name: str, made_by: Callable[[str], Made]) -> None:
    """In the folders of calibrated recipes: 8-bit weights that no factor reached, bit for bit."""
    made = made_by(name)
    wide = made.tree.get("wide_inputs", [])
    method, smoothed = made.tree.get("method", "nearest"), "smoothing" in made.tree
    for key, weight in _products(made).items():
        # With grouped heads AWQ finds nothing before the output projection that takes factors.
        kept = (
            (not smoothed and method != "awq")
            or key.endswith("lm_head.weight")
            or (method == "awq" and key.endswith("o_proj.weight"))
            or any(fnmatch.fnmatch(key, w) for w in wide)
        ) and method != "gptq"
        if form_of(key, made.tree)["dtype"] in ("int8", "float8e4m3fn") and kept:
            assert same_bits(weight, rounded(made.source[key].float().numpy(), form_of(key, made.tree), "nearest")), key


def fake_quantized(made: Made) -> Tensor:
    """Return the logits [S, vocab_size] of transformers' model, float32, with what is rounded in the bundle rounded."""
    assert made.tree.keys() <= {
        *("description", "compute", "weights", "lm_head", "method", "calibration"),
        *("activations", "smoothing", "wide_inputs", "embed_tokens", "cache"),
    }, "a recipe with a key that this model does not know: say here what it rounds"
    state = dict(made.source)
    if made.folder is not None:  # factors are in its norms
        state |= {name: tensor for name, tensor in made.folder.items() if name in state and tensor.is_floating_point()}
    state = {name: tensor.float() for name, tensor in state.items() if name in made.source}
    state |= {name: torch.from_numpy(weight) for name, weight in reference(made).items()}
    model = MistralForCausalLM(MistralConfig(**CONFIG)).eval()
    model.set_attn_implementation("eager")
    model.load_state_dict(state)
    scales = {
        name.removesuffix(".input_scale"): float(tensor)
        for name, tensor in (made.folder or {}).items()
        if name.endswith(".input_scale")
    }
    kind = made.tree.get("activations")
    wide = ["lm_head.weight", *made.tree.get("wide_inputs", [])]
    taken = {n for n in products(made.source) if kind and not any(fnmatch.fnmatch(n, pattern) for pattern in wide)}
    assert scales.keys() == {name.removesuffix(".weight") for name in taken}
    for module, scale in scales.items():
        model.get_submodule(module).register_forward_pre_hook(rounding_hook(str(kind), scale))
    if "cache" not in made.tree:
        return logits(model)
    assert made.folder is not None and made.tree["cache"] == "int8"
    folder = made.folder
    steps = [
        tuple(float(folder[f"model.layers.{layer}.self_attn.{part}_scale"]) for part in "kv")
        for layer in range(CONFIG["num_hidden_layers"])
    ]
    return logits(model, RoundingCache(model.config, steps))


class RoundingCache(DynamicCache):
    """Keys and values in int8, by one scale each a layer."""

    def __init__(self, config: MistralConfig, steps: list[tuple[float, ...]]) -> None:
        super().__init__(config=config)
        self._steps = steps

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        key, value = (
            torch.fake_quantize_per_tensor_affine(x, step, 0, -128, 127)
            for x, step in zip((key_states, value_states), self._steps[layer_idx], strict=True)
        )
        return super().update(key, value, layer_idx, *args, **kwargs)


def rounding_hook(kind: str, scale: float) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    def hook(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        if kind == "int8":
            return torch.fake_quantize_per_tensor_affine(args[0], scale, 0, -128, 127)
        return (args[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    return hook


def logits(model: MistralForCausalLM, cache: DynamicCache | None = None) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(torch.tensor([IDS]), cache=cache, use_cache=cache is not None).logits[0]
    return found


def in_float32(bundle: Bundle, folder: Path) -> Tensor:
    """Return the logits [S, vocab_size] of the bundle's graph with its floats widened: no noise of float16 turns a rounding."""
    os.link(bundle.file(WEIGHTS), folder / WEIGHTS)
    model = ir.load(bundle.file(GRAPH))
    widen(model)
    ir.save(model, folder / GRAPH)
    options = session_options(exact=True, threads=None)
    session = ort.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], feeds(session.get_inputs(), np.array(IDS)))
    return torch.from_numpy(found[0])


@pytest.mark.parametrize("name", RECIPES)
def test_onnx_runtime_computes_what_a_fake_quantized_model_does(
    name: str, source: Path, made_by: Callable[[str], Made], tmp_path: Path
) -> None:
    made = made_by(name)
    expected, unrounded = fake_quantized(made), logits(MistralForCausalLM.from_pretrained(source, dtype=torch.float32))

    def off(found: Tensor) -> float:
        return float((found - expected).square().mean().sqrt() / expected.std())

    wide = off(in_float32(made.bundle, tmp_path))
    assert wide < 1e-5
    assert name == "fp32" or wide < 0.01 * off(unrounded)
    # In float16 what is rounded while it runs goes either way.
    if made.tree["compute"] != "bfloat16" and made.tree.keys().isdisjoint({"activations", "cache"}):
        with Model.open(made.bundle.path, "portable", exact=True) as model:
            assert off(torch.from_numpy(model.rows().feed_all([IDS])[0])) < 3e-3
