"""Engines whose products multiply int8 by int8, or float8 by float8."""

from collections.abc import Callable
from pathlib import Path

import pytest

from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.prequantized import choose_recipe
from galerne.optimize.builders.tensorrt.plan import plan
from galerne.optimize.check import check
from galerne.runtime.bundle import GRAPH, Bundle
from galerne.runtime.manifest import Dialect
from galerne.targets.target import load
from tests.conftest import save_mistral
from tests.export.quantized.compressed import quantize_checkpoint
from tests.optimize.builders.tensorrt.contract import build

BundleOf = Callable[..., Bundle]


@pytest.fixture(scope="module")
def rounded_bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    """Return the bundle of a group of `GROUPS` in a dialect."""
    folder = tmp_path_factory.mktemp("rounded")
    source = save_mistral(folder / "source", hidden_size=1024, intermediate_size=2048, num_hidden_layers=1)
    made: dict[tuple[str, str], Bundle] = {}

    def get(group: str, dialect: Dialect = "opset24") -> Bundle:
        if (group, dialect) not in made:
            checkpoint = folder / group
            if not checkpoint.exists():
                quantize_checkpoint(source, checkpoint, {"Linear": group})
            opened = open_checkpoint(checkpoint)
            out = folder / f"{group}-{dialect}"
            made[group, dialect] = export(opened, choose_recipe(opened, None, None), out, chunk=32, dialect=dialect)
        return made[group, dialect]

    return get


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("int8", "a100-80gb"),
        ("int8", "rtx-3090"),
        ("int8", "l4"),
        ("int8", "rtx-5090"),
        ("float8", "l4"),
        ("float8", "rtx-5090"),
    ],
)
def test_it_builds_with_weights_of_a_byte(rounded_bundle: BundleOf, group: str, name: str) -> None:
    """Read back: rounding is a part of a kernel that does more, and the weights are no larger than in the bundle."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX's Python package is not installed")
    bundle = rounded_bundle(group)
    record, engine = build(bundle, name)
    assert record.compute_capability == load(name).compute_capability
    # Each of two profiles has kernels of about a megabyte; weights of two bytes would be 9 MB more.
    assert engine.stat().st_size < bundle.file("weights.bin").stat().st_size + 5e6
    norm_and_rounding = {"int8": b"MulMulMinMaxRounCast", "float8": b"DivMulMulCast"}[group]
    assert norm_and_rounding in engine.read_bytes()


@pytest.mark.tensorrt
def test_the_primitive_dialect_builds(rounded_bundle: BundleOf) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX's Python package is not installed")
    bundle = rounded_bundle("int8", "primitive")
    assert bundle.manifest.graph.opset == 20  # what TensorRT 10.3 reads
    _, engine = build(bundle, "rtx-3090")
    assert engine.stat().st_size < bundle.file("weights.bin").stat().st_size + 6e6


@pytest.mark.parametrize(
    ("group", "name", "stack", "message"),
    [
        ("float8", "rtx-3090", "tensorrt-rtx-1.7", "found fp8, expected .*: .*int8-w8a8.*choose another target: .*l4"),
        ("float8", "jetson-orin-nx-16gb", "jetpack-7.2", "found fp8, expected .*: .*int8-w8a8"),
        ("int8", "t4", "tensorrt-rtx-1.7", "MatMul: found float32, expected float16 or int8: .*--stack tensorrt-10.16"),
    ],
)
def test_a_type_that_the_target_lacks_is_refused_first(
    rounded_bundle: BundleOf, tmp_path: Path, group: str, name: str, stack: str, message: str
) -> None:
    target = load(name)
    with pytest.raises(InputError, match=message):
        plan(rounded_bundle(group), target, target.stack(stack), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("group", "dialect", "name", "stack"),
    [
        ("int8", "opset24", "jetson-orin-nx-16gb", "jetpack-7.2"),
        ("int8", "primitive", "jetson-orin-nx-16gb", "jetpack-6.2"),
        ("float8", "opset24", "jetson-thor-t5000", "jetpack-7.2"),
        ("float8", "opset24", "h100-sxm", "tensorrt-11"),
    ],
)
def test_a_type_that_the_target_has_passes_the_check(
    rounded_bundle: BundleOf, group: str, dialect: Dialect, name: str, stack: str
) -> None:
    target = load(name)
    assert check(rounded_bundle(group, dialect).file(GRAPH), target, target.stack(stack)) == []
