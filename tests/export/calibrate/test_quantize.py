"""A quantized folder is one that transformers, the export and the reference read alike, whatever the source's layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from galerne.export.calibrate.quantize import quantize
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.families.registry import read_spec
from galerne.export.parity.streamed import StreamedModel
from galerne.export.parity.verify import verify
from galerne.export.prequantized import choose_recipe
from galerne.export.shared_table import is_shared
from galerne.optimize.quantize import recipe

TINY = Path(__file__).parents[3] / "examples" / "tiny-mistral"
TEXT = Path(__file__).parents[3] / "examples" / "tiny-mistral" / "held-out.txt"
FAMILIES = ["mistral", "llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"]
TIED = {"llama", "gemma2", "gemma3"}


def logits(folder: Path, ids: Tensor) -> Tensor:
    """Return the logits of our reference: transformers with weights that were dequantized from the formats' description."""
    with torch.inference_mode():
        found: Tensor = StreamedModel(open_checkpoint(folder)).model(ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_it_as_the_reference_does(family: str, quantized_of: Callable[..., Path]) -> None:
    folder = quantized_of(family)
    ids = torch.arange(3, 60)[None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        found = model(ids, use_cache=False).logits
    assert (found - logits(folder, ids)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("family", "method"), [*((family, "awq") for family in FAMILIES), ("mistral", "gptq"), ("mistral", "search")]
)
def test_export_and_verify_take_it(family: str, method: str, quantized_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(quantized_of(family, method))
    bundle = export(checkpoint, choose_recipe(checkpoint, None, None), tmp_path / "bundle", chunk=8)
    assert bundle.manifest.recipe["weights"] == {"dtype": "int4", "block_size": 32}
    assert bundle.manifest.recipe["lm_head"]["dtype"] == bundle.manifest.recipe["embed_tokens"]["dtype"] == "int8"
    # The folder has two tensors where its source had one, and the bundle has one again.
    assert bundle.manifest.model.tie_word_embeddings == (family in TIED)
    report = verify(bundle, checkpoint)
    assert report.passed, [case for case in report.cases if not case.passed]


def test_calibration_loses_less_than_rounding_to_nearest(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    text = (TINY / "held-out.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[20_000:], encoding="utf-8")
    ids = torch.tensor(Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text[:5_000]).ids[:512])[None]
    source = torch.log_softmax(logits(TINY, ids), -1)

    def divergence(method: str) -> float:
        chosen = recipe.load(str(make_recipe(tmp_path, method, tokens=4096, length=128, block=128)))
        made = quantize(open_checkpoint(TINY), chosen, method, tmp_path / "text.txt", tmp_path / method)
        found = torch.log_softmax(logits(made, ids), -1)
        return float((source.exp() * (source - found)).sum(-1).mean())

    nearest = divergence("nearest")
    assert divergence("gptq") < 0.6 * nearest
    assert divergence("awq") < nearest


def test_everything_but_the_products_is_as_in_the_source(
    family_of: Callable[[str], Path], quantized_of: Callable[..., Path]
) -> None:
    source, folder = load_file(family_of("qwen2") / "model.safetensors"), quantized_of("qwen2")
    made: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        made |= load_file(file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == made.keys()
    kept = {name for name in source if not name.endswith("_proj.weight") and name != "lm_head.weight"}
    assert all(torch.equal(made[name], source[name]) and made[name].dtype == source[name].dtype for name in kept)
    assert made["lm_head.weight"].dtype == torch.int8
    assert made["lm_head.weight_scale"].shape == (2048, 1)
    assert made["model.layers.1.mlp.down_proj.weight_packed"].shape == (64, 12)
    for name, tensor in made.items():
        if name.endswith("weight_scale"):
            assert tensor.dtype == torch.float16
            assert bool((tensor > 0).all())


def test_a_tied_projection_gets_weights_of_its_own(quantized_of: Callable[..., Path]) -> None:
    folder = quantized_of("llama")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    checkpoint = open_checkpoint(folder)
    table, head = checkpoint.read("model.embed_tokens.weight"), checkpoint.read("lm_head.weight")
    # GPTQ moves a weight by more than half a step, to make up for others.
    assert np.abs(head - table).max() <= 3 * np.abs(table).max() / 127
    assert not np.array_equal(head, table)


@pytest.mark.parametrize(("weights", "shared"), [('"int4", block_size = 32', True), ('"int8"', False)])
def test_a_tied_projection_is_rounded_with_the_table_or_by_gptq(
    family_of: Callable[[str], Path], tmp_path: Path, weights: str, shared: bool
) -> None:
    """Beside int8 layers GPTQ's projection is worth a tensor of its own, beside int4 layers it is not."""
    path = tmp_path / "gptq.toml"
    path.write_text(
        f'description = "a table in int8"\ncompute = "float16"\nmethod = "gptq"\nweights = {{ dtype = {weights} }}\n'
        'lm_head = { dtype = "int8" }\nembed_tokens = { dtype = "int8" }\ncalibration = { tokens = 256, length = 32 }\n'
    )
    chosen = recipe.load(str(path))
    checkpoint = open_checkpoint(quantize(open_checkpoint(family_of("llama")), chosen, "gptq", TEXT, tmp_path / "out"))
    assert is_shared(read_spec(checkpoint.config, "config"), checkpoint, chosen) == shared


def test_other_formats_by_name_are_kept_apart(
    family_of: Callable[[str], Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    extra = (
        '[[overrides]]\nmatch = "model.layers.0.mlp.*"\nformat = { dtype = "int8" }\n'
        '[[overrides]]\nmatch = "*.1.self_attn.[ov]_proj.*"\nformat = { dtype = "float16" }\n'
    )
    chosen = recipe.load(str(make_recipe(tmp_path, "awq", lm_head="float16", extra=extra)))
    folder = quantize(open_checkpoint(family_of("llama")), chosen, "mixed", TEXT, tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True  # the projection is not rounded, so it stays the table
    table = config["quantization_config"]
    assert table["format"] == "mixed-precision"
    assert table["ignore"] == ["lm_head", "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.v_proj"]
    others = [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")]
    groups = {tuple(group["targets"]): group["weights"]["num_bits"] for group in table["config_groups"].values()}
    assert groups == {("Linear",): 4, tuple(others): 8}
    ids = torch.arange(3, 60)[None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        found = model(ids, use_cache=False).logits
    assert (found - logits(folder, ids)).abs().max() < 1e-3
    checkpoint = open_checkpoint(folder)
    bundle = export(checkpoint, choose_recipe(checkpoint, None, None), tmp_path / "bundle", chunk=8)
    assert verify(bundle, checkpoint).passed


def test_the_record_names_recipe_source_and_text(quantized_of: Callable[..., Path]) -> None:
    record = json.loads((quantized_of("tiny") / "galerne.json").read_text())
    assert record["recipe"] == "gptq"
    assert record["resolved"]["method"] == "gptq"
    assert (record["text"]["name"], record["text"]["tokens"]) == ("held-out.txt", 256)
    assert record["source"]["files"]["model.safetensors"]["size"] == (TINY / "model.safetensors").stat().st_size


def test_mistrals_own_layout_gives_the_same_weights(
    quantized_of: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    native = tmp_path / "native"
    native.mkdir()
    own = {"embed_tokens": "tok_embeddings", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    own |= {"self_attn": "attention", "mlp": "feed_forward", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    own |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "lm_head": "output"}
    tensors = {}
    for name, tensor in load_file(TINY / "model.safetensors").items():
        if ".q_proj" in name or ".k_proj" in name:
            tensor = tensor.reshape(tensor.shape[0] // 32, 2, 16, -1).transpose(1, 2).reshape(tensor.shape)
        parts = [own.get(part, part) for part in name.removeprefix("model.").split(".")]
        tensors[".".join(parts)] = tensor.contiguous()
    save_file(tensors, native / "consolidated.safetensors")
    params: dict[str, float] = {
        "dim": 256,
        "n_layers": 4,
        "head_dim": 32,
        "hidden_dim": 640,
        "n_heads": 8,
        "n_kv_heads": 2,
    }
    params |= {"norm_eps": 1e-5, "vocab_size": 2048, "rope_theta": 10000.0, "sliding_window": 128, "max_seq_len": 2048}
    (native / "params.json").write_text(json.dumps(params))
    shutil.copy(TINY / "tokenizer.json", native)
    chosen = recipe.load(str(make_recipe(tmp_path)))
    made = quantize(open_checkpoint(native), chosen, "gptq", TEXT, tmp_path / "made")
    expected = quantized_of("tiny")
    for file in sorted(expected.glob("*.safetensors")):
        found, wanted = load_file(made / file.name), load_file(file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), file.name
