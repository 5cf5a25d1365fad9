"""Mixtral: each expert rounded on the tokens that its router sends there, and a folder that all readers read alike."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from galerne.errors import InputError
from galerne.export.calibrate.experts import split_experts
from galerne.export.calibrate.folder import QuantizedFolder
from galerne.export.calibrate.quantize import quantize
from galerne.export.calibrate.source import LayerWeights
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.streamed import StreamedModel
from galerne.export.parity.verify import verify
from galerne.export.prequantized import choose_recipe
from galerne.export.text import sequences
from galerne.optimize.quantize import recipe
from galerne.runtime.tokenizer import Tokenizer

TEXT = Path(__file__).parents[3] / "examples" / "tiny-mistral" / "held-out.txt"
IDS = torch.arange(3, 60)[None]
EXPERTS, LARGEST = 4, {"int8": 127, "float8e4m3fn": 448}
ROUNDED = (
    'compute = "float16"\nactivations = "{0}"\nsmoothing = {1}\n'
    'weights = {{ dtype = "{0}" }}\nlm_head = {{ dtype = "int8" }}\n'
)

Families = Callable[[str], Path]


def logits(folder: Path, **options: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = StreamedModel(open_checkpoint(folder), **options).model(IDS, use_cache=False).logits
    return found


def by_inputs(folder: Path, source: Path, kind: str, smoothing: float = 0.5, tokens: int = 512) -> Path:
    """Quantize with inputs rounded too."""
    own = folder / f"{kind}.toml"
    own.write_text(
        f'description = "x"\n{ROUNDED.format(kind, smoothing)}calibration = {{ tokens = 512, length = 64 }}\n'
    )
    return quantize(open_checkpoint(source), recipe.load(str(own)), kind, TEXT, folder / "made", tokens=tokens)


def check_bundle(folder: Path, out: Path) -> None:
    checkpoint = open_checkpoint(folder)
    bundle = export(checkpoint, choose_recipe(checkpoint, None, None), out, chunk=8)
    report = verify(bundle, checkpoint)
    assert report.passed, [(case.name, case.failures) for case in report.all_cases if not case.passed]


def test_experts_apart_compute_what_transformers_does(family_of: Families) -> None:
    source = family_of("mixtral")
    weights = LayerWeights(open_checkpoint(source), tied=False)
    apart = StreamedModel(open_checkpoint(source), substitute=weights, prepare=split_experts).model
    assert f"model.layers.1.mlp.experts.{EXPERTS - 1}.w2" in dict(apart.named_modules())
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        found, expected = (model(IDS, use_cache=False).logits for model in (apart, whole))
    assert (found - expected).abs().max() < 1e-5


# transformers says that it takes the folder's own config and of the one that it is given `dequantize` alone: as it should.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config` or equivalent parameters:UserWarning")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_four_bits(method: str, family_of: Families, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    own = make_recipe(tmp_path, method, tokens=1024, length=64, lm_head="float16")
    folder = quantize(open_checkpoint(family_of("mixtral")), recipe.load(str(own)), method, TEXT, tmp_path / "made")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].keys()
    experts = [
        f"model.layers.0.block_sparse_moe.experts.{e}.w{i}.weight_packed" for e in range(EXPERTS) for i in (1, 2, 3)
    ]
    assert {*experts, "model.layers.0.block_sparse_moe.gate.weight"} <= names
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", *(f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(2))]
    # transformers has no modules for single experts that could stay packed, so it has to dequantize as it loads.
    wide = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", quantization_config=wide
    )
    with torch.inference_mode():
        found, reference = model(IDS, use_cache=False).logits, logits(folder)
    assert (found - reference).abs().max() < 0.01 * reference.std()
    source = logits(family_of("mixtral"))
    assert (reference - source).square().mean().sqrt() < 0.35 * source.std()
    check_bundle(folder, tmp_path / "bundle")


@pytest.mark.parametrize("kind", ["int8", pytest.param("float8e4m3fn", marks=pytest.mark.slow)])
def test_rounded_inputs(kind: str, family_of: Families, tmp_path: Path) -> None:
    folder = by_inputs(tmp_path, family_of("mixtral"), kind)
    source, plain, rounded = logits(family_of("mixtral")), logits(folder, rounded_inputs=False), logits(folder)
    off = [float((found - source).square().mean().sqrt() / source.std()) for found in (plain, rounded)]
    assert 0 < off[0] < off[1] < 0.15  # factors have not changed what it computes, and inputs are rounded indeed
    check_bundle(folder, tmp_path / "bundle")


@pytest.mark.parametrize("tokens", [512, 128])
def test_scales_are_those_of_the_tokens_that_go_to_an_expert(
    tokens: int, family_of: Families, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 128 tokens, of which each expert gets some 64, they are those of all tokens, and that is said."""
    folder = by_inputs(tmp_path, family_of("mixtral"), "int8", smoothing=0.0, tokens=tokens)
    said = [line for line in capsys.readouterr().err.splitlines() if "experts" in line]
    if tokens == 128:
        assert len(said) == 2
        pattern = (
            r"model.layers.0.block_sparse_moe: fewer than 128 tokens for some experts \(0 gets \d+, .*\): .* on all"
        )
        assert re.fullmatch(pattern, said[0])
    else:
        assert not said
    ids = sequences(Tokenizer.parse((folder / "tokenizer.json").read_bytes(), 1, "", ""), TEXT, 64, tokens)
    model, seen = StreamedModel(open_checkpoint(folder), rounded_inputs=False).model, list[tuple[Tensor, Tensor]]()
    model.get_submodule("model.layers.0.mlp.experts").register_forward_pre_hook(
        lambda _, args: seen.append((args[0], args[1]))
    )
    with torch.inference_mode():
        model(torch.from_numpy(ids), use_cache=False)
    ((x, index),) = seen
    largest = [float(x[(index == e).any(dim=1)].abs().max()) for e in range(EXPERTS)]
    assert len({round(value, 4) for value in largest}) > 1
    expected = largest if tokens == 512 else [float(x.abs().max())] * EXPERTS
    with safe_open(folder / "model-00001-of-00003.safetensors", "pt") as opened:
        for e, value in enumerate(expected):
            for part in ("w1", "w3"):
                scale = opened.get_tensor(f"model.layers.0.block_sparse_moe.experts.{e}.{part}.input_scale")
                assert float(scale) * 127 == pytest.approx(value, rel=1e-3)


def test_a_run_that_was_stopped_goes_on(
    family_of: Families, make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, source = recipe.load(str(make_recipe(tmp_path))), open_checkpoint(family_of("mixtral"))
    whole = quantize(source, own, "gptq", TEXT, tmp_path / "whole")
    write = QuantizedFolder.write

    def stop(self: QuantizedFolder, number: int, tensors: dict[str, Tensor]) -> None:
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, tensors)

    monkeypatch.setattr(QuantizedFolder, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, own, "gptq", TEXT, tmp_path / "again")
    monkeypatch.undo()
    again = quantize(source, own, "gptq", TEXT, tmp_path / "again")
    for file in whole.iterdir():
        assert np.array_equal(np.fromfile(file, np.uint8), np.fromfile(again / file.name, np.uint8)), file.name


def test_the_recipe_that_ships_leaves_the_last_products_wide(family_of: Families) -> None:
    own, names = recipe.load("int8-w8a8"), open_checkpoint(family_of("mixtral")).shapes().keys()
    recipe.check_overrides(own, names, "it")
    expert = "model.layers.0.block_sparse_moe.experts.1"
    assert [own.inputs_of(f"{expert}.w{i}.weight") for i in (1, 2, 3)] == ["int8", None, "int8"]
    with pytest.raises(
        InputError, match=r"wide_inputs: '\*.down_proj.weight' or '\*.w2.weight' matches no weight of it"
    ):
        recipe.check_overrides(own, ["lm_head.weight"], "it")
