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


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(InputError, match="'int5': unknown; there are bf16, fp16, fp32, int4-rtn, int8"):
        recipe.load("int5")
    with pytest.raises(InputError, match="no such recipe file"):
        recipe.load("no/such.toml")


@pytest.mark.parametrize(("size", "block"), [(4096, 128), (576, 64), (96, 32)])
def test_block_gives_way_where_it_does_not_divide(size: int, block: int) -> None:
    assert WeightFormat("int4", 128).block_for(size, "w") == block


def test_no_block_divides() -> None:
    with pytest.raises(InputError, match="w: its input axis of 100 is divided by none of the int4 blocks 128, 64, 32"):
        WeightFormat("int4", 128).block_for(100, "w")
