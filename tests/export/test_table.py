"""An int8 embedding table: stored once where it is the vocabulary projection too, proven, lowered, and counted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.verify import verify
from galerne.export.quality.bundle_weights import BundleWeights
from galerne.optimize.builders.build import build
from galerne.optimize.check import check
from galerne.optimize.quantize.recipe import WeightFormat, load
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.cpu import ENGINE_GRAPH
from galerne.runtime.footprint import TABLE, forms_of, stored_weight_bytes
from galerne.targets import target as targets
from tests.conftest import save_mistral

VALUES, SCALE = f"{TABLE}_quantized", f"{TABLE}_scale"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A random model and its bundle in int8. The vocabulary is no multiple of four."""
    folder = tmp_path_factory.mktemp("table")
    source = save_mistral(folder / "checkpoint", tie_word_embeddings=request.param, vocab_size=203, num_hidden_layers=1)
    return source, export(open_checkpoint(source), load("int8"), folder / "bundle", chunk=8)


def tensors(bundle: Bundle) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(bundle.file(GRAPH), load_external_data=False).graph.initializer}


def place(tensor: TensorProto) -> tuple[str, str]:
    found = {entry.key: entry.value for entry in tensor.external_data}
    return found["offset"], found["length"]


def test_rows_are_rounded_to_nearest(bundle: tuple[Path, Bundle]) -> None:
    source, made = bundle
    table = load_file(source / "model.safetensors")[TABLE].float().numpy()
    scale = (np.abs(table).max(axis=1) / 127).astype(np.float16).astype(np.float32)[:, None]
    wanted = np.clip(np.rint(table / scale), -127, 127) * scale
    found = BundleWeights(made).parameter(TABLE, {TABLE: table.shape})
    assert found is not None
    # The quotient is taken by the scale's reciprocal, so a value in the middle of two may go either way.
    assert np.abs(found.numpy() - wanted).max() <= scale.max() * 1.001
    assert (found.numpy() == wanted).mean() > 0.999


def test_one_tensor_serves_both_where_they_are_tied(bundle: tuple[Path, Bundle]) -> None:
    _, made = bundle
    found = tensors(made)
    tied = made.manifest.model.tie_word_embeddings
    shared = place(found[VALUES]) == place(found["lm_head.weight_quantized"])
    assert shared == tied
    assert (place(found[SCALE]) == place(found["lm_head.weight_scale"])) == tied
    size = stored_weight_bytes(made.manifest.model, forms_of(made.manifest.recipe))
    pages = 4096 * len(found)
    assert size <= made.manifest.files[WEIGHTS].size <= size + pages


def test_it_is_proven(bundle: tuple[Path, Bundle]) -> None:
    source, made = bundle
    assert verify(made, open_checkpoint(source)).passed


def test_the_primitive_dialect_has_it_too(bundle: tuple[Path, Bundle], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(bundle[0])
    made = export(checkpoint, load("int4-rtn"), tmp_path / "bundle", chunk=8, dialect="primitive")
    assert verify(made, checkpoint).passed
    target = targets.load("jetson-orin-nx-16gb")
    stack = next(stack for stack in target.stacks if stack.dialect == "primitive")
    assert check(made.file(GRAPH), target, stack) == []


def test_the_cpu_engine_multiplies_by_a_packed_projection(bundle: tuple[Path, Bundle]) -> None:
    """ONNX Runtime fuses a projection whose weight nothing else reads; and only the rows that are picked become floats."""
    build(bundle[1], targets.load("cpu"))
    engine = bundle[1].path / "engines" / "cpu" / ENGINE_GRAPH
    graph = onnx.load(engine, load_external_data=False).graph
    assert not [node for node in graph.node if node.op_type == "DequantizeLinear"]
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    gathers = [node for node in graph.node if node.op_type == "Gather" and TABLE in node.input[0]]
    assert sorted(kinds[node.input[0]] for node in gathers) == [TensorProto.INT8, TensorProto.FLOAT16]


def test_another_format_of_the_projection_keeps_them_apart(saved_mistral: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved_mistral(tie_word_embeddings=True, num_hidden_layers=1))
    recipe = replace(load("int4-rtn"), lm_head=WeightFormat("int4", 32))
    made = export(checkpoint, recipe, tmp_path / "bundle", chunk=8)
    found = tensors(made)
    assert found[VALUES].data_type == TensorProto.INT8
    assert found["lm_head.weight_quantized"].data_type == TensorProto.INT4
    assert verify(made, checkpoint).passed


def test_a_damaged_table_is_told(saved_mistral: Callable[..., Path], tmp_path: Path) -> None:
    for tied in (True, False):
        folder = tmp_path / f"tied-{tied}"
        source = saved_mistral(tie_word_embeddings=tied, num_hidden_layers=1)
        folder.mkdir()
        weights = load_file(source / "model.safetensors")
        weights[TABLE][5, 3] = torch.nan
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=rf"{TABLE}: holds NaN or infinity"):
            export(open_checkpoint(folder), load("int8"), tmp_path / "bundle", chunk=8)
        assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('embed_tokens = { dtype = "int4", block_size = 128 }', "embed_tokens: expected dtype int8 or float16"),
        ('embed_tokens = { dtype = "float32" }', "embed_tokens: expected dtype int8 or float16"),
        ('embed_tokens = "int8"', "embed_tokens: expected a table"),
    ],
)
def test_a_bad_format_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        f'description = "x"\ncompute = "float16"\nweights = {{ dtype = "int8" }}\nlm_head = {{ dtype = "int8" }}\n{line}\n'
    )
    with pytest.raises(InputError, match=said):
        load(str(path))
