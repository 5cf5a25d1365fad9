"""Every compute capability that TensorRT-RTX builds for, with each type that it takes, on a machine without a GPU."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.prequantized import choose_recipe
from galerne.optimize.builders.build import build
from galerne.optimize.builders.tensorrt.compile import ENGINE
from galerne.optimize.builders.tensorrt.inspect import inspect_engine
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines.record import load_record
from galerne.targets.target import load

STACK = "tensorrt-rtx-1.7"
# A target of each compute capability.
TARGETS = {
    "t4": "7.5",
    "a100-80gb": "8.0",
    "a10": "8.6",
    "l4": "8.9",
    "rtx-5090": "12.0",
    "dgx-spark": "12.1",
}
# Recipes, and float8 weights, by the type that a target must have.
TYPES = {"fp16": "float16", "bf16": "bfloat16", "int8": "int8", "int4-rtn": "int4", "fp8": "fp8"}
FP8_MAX = 448.0

pytestmark = pytest.mark.tensorrt
Bundles = Callable[[str], Bundle]


def save_fp8(source: Path, folder: Path) -> Path:
    """Write a checkpoint's linear layers as compressed-tensors does at float8: E4M3 with a scale for each output channel."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / FP8_MAX
            tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale.half()
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def bundles(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Return the bundle of a recipe, or of float8 weights; builds enter their engines into it."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX's Python package is not installed")
    made: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        if name not in made:
            folder = tmp_path_factory.mktemp("ahead")
            source = save_fp8(checkpoint_folder, folder / "float8") if name == "fp8" else checkpoint_folder
            checkpoint = open_checkpoint(source)
            recipe = choose_recipe(checkpoint, None, None if name == "fp8" else name)
            made[name] = export(checkpoint, recipe, folder / name, chunk=8)
        return made[name]

    return get


def _cases() -> Iterator[Any]:
    """Every target with every type; by default each target once, each type once, and what is refused."""
    for target in TARGETS:
        for name, needed in TYPES.items():
            quick = name == "fp16" or target == "l4" or needed not in load(target).stack(STACK).types
            yield pytest.param(target, name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("target", "name"), list(_cases()))
def test_a_target_takes_a_type_or_refuses_it_first(bundles: Bundles, target: str, name: str) -> None:
    chosen = load(target)
    if TYPES[name] not in chosen.stack(STACK).types:
        with pytest.raises(InputError, match=f"{TYPES[name]}, expected .*--precision"):
            build(bundles(name), chosen, stack=chosen.stack(STACK))
        return
    built = build(bundles(name), chosen, stack=chosen.stack(STACK), force=True)
    record = load_record(built, target)
    assert record.compute_capability == TARGETS[target]
    assert (record.backend, record.stack, record.platform, record.cuda) == ("tensorrt_rtx", STACK, None, "13")
    assert record.timing_cache is None
    engine = built.file(f"engines/{target}/{ENGINE}")
    assert inspect_engine(engine).size == engine.stat().st_size > built.file("weights.bin").stat().st_size
    built.verify_hashes([f"engines/{target}/{ENGINE}"])
