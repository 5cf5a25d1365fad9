"""Adapters that are chosen at run time: they give what peft gives, come and go on one model, and what does not fit is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.candidate import CandidateRunner
from galerne.export.parity.verify import verify
from galerne.export.prequantized import choose_recipe
from galerne.optimize.builders.build import build
from galerne.optimize.quantize import recipe
from galerne.runtime.adapter import Adapter
from galerne.runtime.bundle import Bundle
from galerne.runtime.generate import Generation
from galerne.runtime.manifest import Dialect
from galerne.runtime.model import Model
from galerne.targets.target import load

Adapt = Callable[..., dict[str, torch.Tensor]]
Slotted = Callable[..., Bundle]
IDS = [
    int(token) for token in np.random.default_rng(3).integers(0, 501, 45)
]  # past the window of 16, and around the ring


@pytest.fixture(scope="session")
def slotted(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Slotted:
    """Return the shared checkpoint's bundle with adapter slots and a `cpu` engine, made once for each recipe and dialect."""
    made: dict[tuple[str, str], Bundle] = {}

    def get(name: str = "fp32", dialect: Dialect = "opset24") -> Bundle:
        if (name, dialect) not in made:
            out, source = tmp_path_factory.mktemp("slotted") / name, open_checkpoint(checkpoint_folder)
            made[name, dialect] = export(source, recipe.load(name), out, chunk=8, dialect=dialect, adapter_slots=True)
            made[name, dialect] = build(made[name, dialect], load("cpu"))
        return made[name, dialect]

    return get


def torch_logits(folder: Path, weights: dict[str, torch.Tensor]) -> np.ndarray:
    """Return transformers' logits [tokens, vocab_size] of IDS, with some of the checkpoint's weights replaced."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return np.asarray(model(torch.tensor([IDS])).logits[0])


def logits(model: Model, adapter: Adapter | None) -> np.ndarray:
    return model.rows(adapter=adapter).feed_all([IDS])[0]


def greedy(model: Model, adapter: Adapter | None) -> list[int]:
    generation = Generation(model, [IDS], max_new_tokens=30, ignore_eos=True, adapter=adapter)
    return [token for _, token in generation]


SOME = {
    "target_modules": ["v_proj", "k_proj", "up_proj"],
    "alpha_pattern": {"v_proj": 30},
    "rank_pattern": {"k_proj": 7},
}


@pytest.mark.parametrize(
    ("engine", "dialect", "settings"),
    [
        ("portable", "opset24", {}),
        ("cpu", "opset24", SOME),
        ("portable", "primitive", {"use_rslora": True, "target_modules": "all-linear"}),
    ],
)
def test_gives_what_peft_gives(
    engine: str,
    dialect: Dialect,
    settings: dict[str, Any],
    slotted: Slotted,
    adapt: Adapt,
    checkpoint_folder: Path,
    tmp_path: Path,
) -> None:
    merged = adapt(checkpoint_folder, tmp_path / "adapter", **settings)
    model = Model.open(slotted("fp32", dialect).path, engine)
    adapter = model.load_adapter(tmp_path / "adapter")
    got, wanted = logits(model, adapter), torch_logits(checkpoint_folder, merged)
    assert np.abs(got - wanted).max() <= 1e-3
    bare = torch_logits(checkpoint_folder, {})
    assert np.abs(logits(model, None) - bare).max() <= 1e-3
    assert np.abs(wanted - bare).max() > 0.1  # so that an adapter left out would show


def test_gives_the_tokens_of_a_bundle_that_it_is_merged_into(
    slotted: Slotted, adapt: Adapt, checkpoint_folder: Path, tmp_path: Path
) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    merged = export(
        open_checkpoint(checkpoint_folder, tmp_path / "adapter"), recipe.load("fp32"), tmp_path / "merged", chunk=8
    )
    model, other = Model.open(slotted().path), Model.open(merged.path)
    assert model.engine.name == "cpu"
    assert greedy(model, model.load_adapter(tmp_path / "adapter")) == greedy(other, None) != greedy(model, None)


def test_several_adapters_on_one_model(slotted: Slotted, adapt: Adapt, checkpoint_folder: Path, tmp_path: Path) -> None:
    """They take turns, token by token too, and each gives its own tokens again."""
    model = Model.open(slotted("fp16").path)
    held: list[Adapter | None] = [None]
    for seed in (1, 2):
        adapt(checkpoint_folder, tmp_path / str(seed), seed=seed, r=3 * seed)
        held.append(model.load_adapter(tmp_path / str(seed)))
    first = [greedy(model, adapter) for adapter in held]
    assert len({tuple(ids) for ids in first}) == 3
    assert [greedy(model, adapter) for adapter in reversed(held)] == first[::-1]
    sessions = [model.session(adapter) for adapter in held]
    for session in sessions:
        session.append(IDS)
    taken: list[list[int]] = [[] for _ in sessions]
    for _ in range(30):
        for session, ids in zip(sessions, taken, strict=True):
            ids.append(int(session.logits.argmax()))
            session.append(ids[-1:])
    assert taken == first


def test_on_weights_that_were_quantized_before(
    make_awq: Callable[..., Any], adapt: Adapt, checkpoint_folder: Path, tmp_path: Path
) -> None:
    """The products beside quantized weights are not rounded: the same as transformers with the dequantized weights and theirs."""
    awq, targets = make_awq(tmp_path / "awq"), ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    merged = adapt(checkpoint_folder, tmp_path / "adapter", target_modules=targets)
    base = AutoModelForCausalLM.from_pretrained(checkpoint_folder, dtype=torch.float32).state_dict()
    weights = {name: values + merged[name] - base[name] for name, values in awq.weights.items()}
    source = open_checkpoint(awq.folder)
    bundle = export(source, choose_recipe(source, None, None), tmp_path / "bundle", chunk=8, adapter_slots=True)
    model = Model.open(bundle.path, "portable", exact=True)
    got, wanted = logits(model, model.load_adapter(tmp_path / "adapter")), torch_logits(checkpoint_folder, weights)
    assert np.abs(got - wanted).max() < 0.03
    assert np.abs(logits(model, None) - torch_logits(checkpoint_folder, awq.weights)).max() < 0.03
    assert np.abs(wanted - torch_logits(checkpoint_folder, awq.weights)).max() > 0.5


@pytest.mark.parametrize(("name", "engine"), [("fp16", "portable"), ("int4-rtn", "portable"), ("int4-rtn", "cpu")])
def test_is_verified_like_a_bundle(
    name: str, engine: str, slotted: Slotted, adapt: Adapt, checkpoint_folder: Path, tmp_path: Path
) -> None:
    """Against transformers with the products beside the rounded weights; without the adapter on one side it fails."""
    adapt(checkpoint_folder, tmp_path / "adapter")
    source = open_checkpoint(checkpoint_folder)
    report = verify(slotted(name), source, engine=engine, adapter=tmp_path / "adapter")
    assert report.passed, [case for case in report.cases if not case.passed]


def test_an_adapter_left_out_is_found(
    slotted: Slotted, adapt: Adapt, checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    monkeypatch.setattr(CandidateRunner, "_adapter", property(lambda self: None, lambda self, _: None), raising=False)
    assert not verify(slotted("fp16"), open_checkpoint(checkpoint_folder), adapter=tmp_path / "adapter").passed


def test_a_bfloat16_file(slotted: Slotted, adapt: Adapt, checkpoint_folder: Path, tmp_path: Path) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    model, path = Model.open(slotted().path), tmp_path / "adapter" / "adapter_model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file({name: tensor.float() for name, tensor in rounded.items()}, path)
    wanted = model.load_adapter(tmp_path / "adapter")
    save_file(rounded, path)
    got = model.load_adapter(tmp_path / "adapter")
    assert got.inputs.keys() == wanted.inputs.keys()
    assert all(np.array_equal(array, wanted.inputs[name]) for name, array in got.inputs.items())
    assert got.fingerprint != wanted.fingerprint


def test_graph_and_manifest(slotted: Slotted, bundle_of: Callable[[str], Bundle]) -> None:
    """Slots are standard operators, and without them a bundle says nothing of adapters."""
    slots, plain = slotted("fp16"), bundle_of("fp16")
    fused = slots.manifest.graph.adapter_slots["model.layers.1.self_attn.qkv_proj"]
    assert fused.modules == tuple(f"model.layers.1.self_attn.{part}_proj" for part in "qkv")
    assert (fused.in_features, fused.out_features) == (128, (128, 64, 64))
    assert len(slots.manifest.graph.adapter_slots) == 2 * 4 + 1
    with_slots, without = (onnx.load(str(bundle.file("model.onnx"))).graph for bundle in (slots, plain))
    added = {value.name for value in with_slots.input} - {value.name for value in without.input}
    assert added == {f"adapters.{name}.{part}" for name in slots.manifest.graph.adapter_slots for part in "AB"}
    assert {node.domain for node in with_slots.node} == {""}
    onnx.checker.check_model(str(slots.file("model.onnx")), full_check=True)
    assert b"adapter" not in plain.file("model.onnx").read_bytes() + (plain.path / "manifest.json").read_bytes()
    assert slots.manifest.files["weights.bin"] == plain.manifest.files["weights.bin"]


def test_a_tied_vocabulary_projection_has_no_slot(
    saved_mistral: Callable[..., Path], adapt: Adapt, tmp_path: Path
) -> None:
    folder = saved_mistral(tie_word_embeddings=True, num_hidden_layers=1)
    adapt(folder, tmp_path / "adapter", target_modules=["q_proj"])
    for name in ("fp16", "int4-rtn"):
        bundle = export(open_checkpoint(folder), recipe.load(name), tmp_path / name, chunk=8, adapter_slots=True)
        assert "lm_head" not in bundle.manifest.graph.adapter_slots
        model = Model.open(bundle.path)
        assert not np.allclose(logits(model, model.load_adapter(tmp_path / "adapter")), logits(model, None))


def test_a_session_belongs_to_its_adapter(
    slotted: Slotted, adapt: Adapt, checkpoint_folder: Path, tmp_path: Path
) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    model = Model.open(slotted().path)
    adapter = model.load_adapter(tmp_path / "adapter")
    session = model.session(adapter)
    session.append(IDS)
    session.save(tmp_path / "saved")
    again, twin = model.load_session(tmp_path / "saved", adapter), session.fork()
    for each in (session, again, twin):
        each.append([7])
    assert np.array_equal(session.logits, again.logits) and np.array_equal(session.logits, twin.logits)
    with pytest.raises(
        InputError, match=r"saved: saved with another model or adapter \(.*…\) than .*; feed the text again"
    ):
        model.load_session(tmp_path / "saved")
    bare = model.session()
    bare.append(IDS)
    bare.save(tmp_path / "bare")
    with pytest.raises(InputError, match="bare: saved with another model or adapter .* with .*adapter"):
        model.load_session(tmp_path / "bare", adapter)


def test_an_adapter_belongs_to_its_bundle_and_type(
    slotted: Slotted, bundle_of: Callable[[str], Bundle], adapt: Adapt, checkpoint_folder: Path, tmp_path: Path
) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    portable = Model.open(slotted("fp16").path, "portable")
    adapter = portable.load_adapter(tmp_path / "adapter")
    assert {array.dtype for array in adapter.inputs.values()} == {np.dtype(np.float16)}
    for other in (Model.open(slotted("fp16").path, "cpu"), Model.open(slotted("fp32").path, "portable")):
        with pytest.raises(
            InputError, match=r"adapter: loaded for another model than .*; load it with the load_adapter"
        ):
            other.session(adapter)
    with pytest.raises(InputError, match=r"has no adapter slots; export it with --adapter-slots"):
        Model.open(bundle_of("fp16").path).load_adapter(tmp_path / "adapter")


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return run


def _config(**changes: Any) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return run


ONE = "base_model.model.model.layers.0.mlp.up_proj.lora_"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_config(use_dora=True), "use_dora: true is not supported; merge the adapter with peft first"),
        (_config(peft_type="IA3"), "peft_type: 'IA3' is not supported; expected 'LORA'"),
        (_config(r=5), "r: 5 for .*, but lora_A has 4 rows"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors in it"),
        (
            _tensors(lambda tensors: tensors.update({f"{ONE}A.weight": torch.zeros(4, 64)})),
            r"lora_A \[4, 64\] and lora_B \[160, 4\] do not fit a weight of \[160, 128\] in .*fp16",
        ),
        (
            _tensors(
                lambda tensors: [
                    tensors.update({ONE.replace("up_proj", "router") + f"{part}.weight": torch.zeros(4, 4)})
                    for part in "AB"
                ]
            ),
            r"layers.0.mlp.router: no adapter slot for it in .*fp16; is it the adapter's base\?",
        ),
        (
            _tensors(lambda tensors: tensors.update({f"{ONE}B.weight": torch.full((160, 4), 6e4)})),
            "layers.0.mlp.up_proj: a value is not finite in float16, which the engine computes in",
        ),
        (
            _tensors(lambda tensors: tensors.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(2, 2)})),
            "lm_head.base_layer.weight: neither lora_A nor lora_B of a linear layer",
        ),
    ],
)
def test_what_cannot_be_taken(
    damage: Callable[[Path], None],
    message: str,
    slotted: Slotted,
    adapt: Adapt,
    checkpoint_folder: Path,
    tmp_path: Path,
) -> None:
    adapt(checkpoint_folder, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    model = Model.open(slotted("fp16").path, "portable")
    with pytest.raises(InputError, match=message) as raised:
        model.load_adapter(tmp_path / "adapter")
    assert "\n" not in str(raised.value)


def test_no_tensorrt_engine_yet(slotted: Slotted) -> None:
    with pytest.raises(InputError, match="has adapter slots, which the tensorrt_rtx builder does not take"):
        build(slotted("fp16"), load("l4"))
