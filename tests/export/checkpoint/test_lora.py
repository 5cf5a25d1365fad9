"""LoRA adapters: what is merged equals what peft merges, and what cannot be merged is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.verify import verify
from galerne.optimize.quantize import recipe

Adapt = Callable[..., dict[str, torch.Tensor]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"v_proj": 3, "layers.1.mlp.up_proj": 40}, "rank_pattern": {"q_proj": 7}},
        {"layers_to_transform": [1], "target_modules": ["k_proj", "gate_proj"]},
    ],
)
def test_merged_as_peft_merges(adapt: Adapt, checkpoint_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    wanted = adapt(checkpoint_folder, tmp_path / "adapter", **settings)
    merged, base = open_checkpoint(checkpoint_folder, tmp_path / "adapter"), open_checkpoint(checkpoint_folder)
    changed = 0
    for name, tensor in wanted.items():
        np.testing.assert_allclose(merged.read(name), tensor.numpy(), rtol=0, atol=1e-6, err_msg=name)
        changed += not np.array_equal(merged.read(name), base.read(name))
    assert changed == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) // 2 > 0


def test_copies_of_the_base_beside_an_adapter(adapt: Adapt, checkpoint_folder: Path, tmp_path: Path) -> None:
    """peft saves the embedding and lm_head too where one of them is adapted; they must be the base's."""
    wanted = adapt(checkpoint_folder, tmp_path / "adapter", embeddings=True)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    copy = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(path)
    assert copy in tensors
    merged = open_checkpoint(checkpoint_folder, tmp_path / "adapter").read("lm_head.weight")
    np.testing.assert_allclose(merged, wanted["lm_head.weight"].numpy(), rtol=0, atol=1e-6)
    tensors[copy][3, 3] += 1
    save_file(tensors, path)
    with pytest.raises(InputError, match="lm_head.base_layer.weight: neither lora_A nor lora_B"):
        open_checkpoint(checkpoint_folder, tmp_path / "adapter")


def test_bundle_of_an_adapted_checkpoint(adapt: Adapt, checkpoint_folder: Path, tmp_path: Path) -> None:
    """It is verified against the base with the adapter, and another checkpoint, the bare base too, is refused."""
    adapt(checkpoint_folder, tmp_path / "adapter")
    adapted = open_checkpoint(checkpoint_folder, tmp_path / "adapter")
    for name in ("fp32", "int4-rtn"):
        bundle = export(adapted, recipe.load(name), tmp_path / name, chunk=8)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(bundle.manifest.source.files)
        report = verify(bundle, adapted)
        assert report.passed, [case for case in report.cases if not case.passed]
    with pytest.raises(InputError, match=r"adapter_config.json: expected .*, found no such file"):
        verify(bundle, open_checkpoint(checkpoint_folder))


def test_a_bundle_without_the_adapter_fails_against_it(
    adapt: Adapt, checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    adapted = open_checkpoint(checkpoint_folder, tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(type(adapted), "read", lambda self, name: self.base.read(name))
        bundle = export(adapted, recipe.load("fp16"), tmp_path / "out", chunk=8)
    assert not verify(bundle, adapted).passed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora: true is not supported; merge the adapter with peft first"),
        (
            {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
            r'modules_to_save: \["lm_head"\] is not supported',
        ),
        ({"bias": "all"}, "bias: 'all' is not supported; expected 'none'"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A: neither lora_A nor lora_B of a linear layer"),
    ],
)
def test_adapters_that_cannot_be_merged(
    adapt: Adapt, checkpoint_folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter", **settings)
    with pytest.raises(InputError, match=message):
        open_checkpoint(checkpoint_folder, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not supported; expected 'LORA'"),
        ({"r": 5}, "r: 5 for .*, but lora_A has 4 rows; the two files do not belong together"),
        ({"lora_alpha": None}, "lora_alpha: expected a number, found None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes the base model too"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is no regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern: expected a table"),
    ],
)
def test_adapter_configs_that_are_not_read(
    adapt: Adapt, checkpoint_folder: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(InputError, match=message):
        open_checkpoint(checkpoint_folder, tmp_path / "adapter")


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return run


ONE = "base_model.model.model.layers.0.mlp.up_proj.lora_"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_tensors(lambda tensors: tensors.clear()), "no tensors in it; the adapter is empty"),
        (_tensors(lambda tensors: tensors.pop(f"{ONE}A.weight")), "up_proj: lora_A is missing"),
        (
            _tensors(lambda tensors: tensors.update({f"{ONE}A.weight": torch.zeros(4, 64)})),
            r"lora_A \[4, 64\] and lora_B \[160, 4\] do not fit a weight of \[160, 128\]",
        ),
        (
            _tensors(
                lambda tensors: tensors.update({ONE.replace("layers.0", "layers.9") + "A.weight": torch.zeros(4, 128)})
            ),
            "lora_B is missing",
        ),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json in it; expected an adapter"),
    ],
)
def test_damaged_adapters(
    adapt: Adapt, checkpoint_folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        open_checkpoint(checkpoint_folder, tmp_path / "adapter")


def test_adapter_of_another_model(adapt: Adapt, checkpoint_folder: Path, tmp_path: Path) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    _tensors(
        lambda tensors: tensors.update(
            {name.replace("layers.0", "layers.9"): tensors.pop(name) for name in list(tensors) if "layers.0" in name}
        )
    )(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"layers.9.*: no weight of this name in .*; is it the adapter's base\?"):
        open_checkpoint(checkpoint_folder, tmp_path / "adapter")


def test_adapter_on_quantized_weights(
    make_awq: Callable[..., Any], adapt: Adapt, checkpoint_folder: Path, tmp_path: Path
) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    with pytest.raises(InputError, match="quantized already with AWQ; an adapter can be merged into floats only"):
        open_checkpoint(make_awq(tmp_path / "awq").folder, tmp_path / "adapter")
