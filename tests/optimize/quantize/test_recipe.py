"""Recipes: those that ship, and what a bad one is answered with."""

from pathlib import Path

import pytest

from galerne.errors import InputError
from galerne.optimize.quantize import recipe
from galerne.optimize.quantize.recipe import WeightFormat

GOOD = """
description = "mine"
compute = "float16"
weights = { dtype = "int4", block_size = 64 }
lm_head = { dtype = "int8" }
"""


def test_every_recipe_that_ships_loads() -> None:
    assert set(recipe.PRECISIONS.values()) <= set(recipe.names())
    for name in recipe.names():
        assert recipe.load(name).description


def test_own_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    loaded = recipe.load(str(path))
    assert loaded.format_for("model.layers.0.mlp.down_proj.weight") == WeightFormat("int4", 64)
    assert loaded.format_for("lm_head.weight").bits == 8


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"int4"',
            '"int3"',
            "weights: dtype: expected one of float32, float16, bfloat16, int8, int4, float8e4m3fn, found 'int3'",
        ),
        ("block_size = 64", "block_size = 48", "weights: block_size: expected"),
        (", block_size = 64", "", "weights: block_size goes with dtype int4"),
        ('"int8" }', '"int8", block_size = 32 }', "lm_head: block_size goes with dtype int4"),
        ('"float16"', '"float32"', "compute: expected float16 with quantized weights, found float32"),
        ("lm_head", "head", "unknown key 'head'; allowed: description, compute, weights, lm_head"),
        ("description", "# description", "missing key 'description'"),
        ("compute =", "compute", "not TOML"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(InputError, match=message):
        recipe.load(str(path))


FULL = """
description = "mine"
compute = "float16"
method = "gptq"
weights = { dtype = "int8" }
lm_head = { dtype = "int8" }
activations = "int8"
wide_inputs = ["*.o_proj.weight"]
smoothing = 0.5
cache = "int8"

[[overrides]]
match = "model.layers.0.*"
format = { dtype = "float16" }

[[overrides]]
match = "*.down_proj.weight"
format = { dtype = "int4", block_size = 32 }

[calibration]
tokens = 2048
length = 256
"""


def test_a_recipe_with_all_there_is(tmp_path: Path) -> None:
    path = tmp_path / "full.toml"
    path.write_text(FULL)
    loaded = recipe.load(str(path))
    assert loaded.calibrated and loaded.calibration == recipe.Calibration(2048, 256)
    assert loaded.format_for("model.layers.0.mlp.down_proj.weight") == WeightFormat("float16")
    assert loaded.format_for("model.layers.1.mlp.down_proj.weight") == WeightFormat("int4", 32)
    names = ("model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight", "lm_head.weight")
    assert [loaded.inputs_of(name) for name in names] == ["int8", None, None]
    assert recipe.read_resolved(loaded.resolved(), "manifest") == loaded


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"gptq"', '"best"', "method: expected one of nearest, search, gptq, awq, found 'best'"),
        ('weights = { dtype = "int8"', 'weights = { dtype = "float16"', "activations: expected quantized weights beside them"),
        ('"int8"\nwide', '"int4"\nwide', "activations: expected one of int8, float8e4m3fn"),
        ('activations = "int8"\n', "", "wide_inputs: leaves out rounded activations, but there are none"),
        ('activations = "int8"\nwide_inputs = ["*.o_proj.weight"]\n', "", "smoothing: .* there are no activations"),
        ('"*.o_proj.weight"', '""', "wide_inputs: expected patterns over names of weights, found ''"),
        ("0.5", "1.5", "smoothing: expected 0 to 1, found 1.5"),
        ("0.5", "-0.5", "smoothing: expected 0 to 1, found -0.5"),
        ("0.5", "nan", "smoothing: expected"),
        ('"model.layers.0.*"', '""', r"overrides\[0\]: match: expected a pattern over names of weights, found ''"),
        ('"float16" }\n\n', '"bfloat16" }\n\n', r"overrides\[0\]: format: dtype: expected float16 as in compute"),
        (", block_size = 32", "", r"overrides\[1\]: format: block_size goes with dtype int4"),
        ("tokens = 2048", "tokens = 128", "calibration: .* found length 256 and tokens 128"),
        ("length = 256", "length = 0", "calibration: expected 2 <= length"),
        ('cache = "int8"', 'cache = "fp8"', "cache: expected one of int8, found 'fp8'"),
        ("[calibration]\ntokens = 2048\nlength = 256", "", r"method: gptq needs a table \[calibration\]"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    assert old in FULL
    path.write_text(FULL.replace(old, new))
    with pytest.raises(InputError, match=message):
        recipe.load(str(path))


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ('activations = "int8"', r"activations: int8 needs a table \[calibration\]"),
        ('method = "awq"', r"method: awq needs a table \[calibration\]"),
        ('cache = "int8"', r"cache: int8 needs a table \[calibration\]"),
        ('overrides = [{ match = "*", format = { dtype = "float8e4m3fn" } }]', "float8e4m3fn needs a"),
    ],
)
def test_what_needs_text_says_so(tmp_path: Path, added: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(GOOD + added)
    with pytest.raises(InputError, match=message):
        recipe.load(str(path))


def test_floats_have_no_method_and_no_rounded_activations_or_cache(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    floats = 'description = ""\ncompute = "float32"\nweights = { dtype = "float32" }\nlm_head = { dtype = "float32" }\n'
    path.write_text(floats + 'method = "search"')
    with pytest.raises(InputError, match="method: search rounds int4 or int8; found weights in float32"):
        recipe.load(str(path))
    path.write_text(floats + 'activations = "int8"\n[calibration]')
    with pytest.raises(InputError, match="activations: expected quantized weights beside them, found float32"):
        recipe.load(str(path))
    path.write_text(floats + 'cache = "int8"\n[calibration]')
    with pytest.raises(InputError, match="compute: expected float16 with a rounded cache, found float32"):
        recipe.load(str(path))
    path.write_text(floats.replace("float32", "float16") + 'cache = "int8"\n[calibration]')
    assert recipe.load(str(path)).cache == "int8"


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(
        InputError,
        match="'int5': unknown; there are bf16, fp16, fp32, fp8, int4-awq, int4-gptq, int4-gptq-256, int4-rtn, "
        "int4-search, int8, int8-kv8, int8-w8a8",
    ):
        recipe.load("int5")
    with pytest.raises(InputError, match="no such recipe file"):
        recipe.load("no/such.toml")


@pytest.mark.parametrize(("size", "block"), [(4096, 256), (640, 128), (576, 64), (96, 32)])
def test_block_gives_way_where_it_does_not_divide(size: int, block: int) -> None:
    assert WeightFormat("int4", 256).block_for(size, "w") == block
    assert WeightFormat("int4", 128).block_for(size, "w") == min(block, 128)


def test_no_block_divides() -> None:
    with pytest.raises(
        InputError, match="w: its input axis of 100 is divided by none of the int4 blocks 256, 128, 64, 32"
    ):
        WeightFormat("int4", 128).block_for(100, "w")
