"""Every target file loads, and a bad one names its field."""

import pytest

from galerne.errors import InputError
from galerne.targets.target import Target, load, load_all, names, parse

GOOD = """
name = "box"
title = "A box"
kind = "datacenter"
compute_capability = "8.9"
memory_bytes = 24_000_000_000
bandwidth_bytes_per_s = 300_000_000_000

[sources]
compute_capability = "its data sheet"
memory_bytes = "its data sheet"
bandwidth_bytes_per_s = "its data sheet"

[[stacks]]
name = "rtx"
backend = "tensorrt_rtx"
types = ["float16", "int8"]
dialect = "opset24"
builds_on = "any"
source = ["its manual"]

[[stacks]]
name = "other"
backend = "tensorrt"
types = ["float16"]
dialect = "primitive"
builds_on = "device"
source = ["its manual"]
"""


def test_every_file_loads_under_its_own_name() -> None:
    assert [target.name for target in load_all()] == names()
    assert {"cpu", "t4", "a100-80gb", "l4", "rtx-5090"} <= set(names())


@pytest.mark.parametrize("target", load_all(), ids=lambda target: target.name)
def test_every_figure_can_be_looked_up(target: Target) -> None:
    """By an address, or else the source says so, or names the figure whose source has it."""
    for key, source in target.sources.items():
        others = [other for other in target.sources if other != key and other in source]
        assert "https://" in source or "not looked up" in source or others, (target.name, key)


@pytest.mark.parametrize("target", load_all(), ids=lambda target: target.name)
def test_figures_are_of_a_likely_size(target: Target) -> None:
    """A slip of three noughts, a sparse rate, or a mode that is faster than the device would show here."""
    if target.kind == "cpu":
        return
    assert target.memory_bytes is not None and target.usable_bytes is not None
    assert target.bandwidth_bytes_per_s is not None
    assert target.memory_bytes % 2**30 == 0
    assert 0.45 * target.memory_bytes < target.usable_bytes < target.memory_bytes
    rates = target.dense_ops_per_s
    assert 3e10 < target.bandwidth_bytes_per_s < 1e13
    assert 1.9 <= rates.get("int8", rates.get("fp8", 0)) / rates["float16"] <= 2.1
    if "fp4" in rates:
        assert 1.9 <= rates["fp4"] / rates["fp8"] <= 2.1
    modes = [mode.bandwidth_bytes_per_s for mode in target.power_modes if mode.bandwidth_bytes_per_s]
    assert all(mode < target.bandwidth_bytes_per_s for mode in modes)
    assert len({mode.number for mode in target.power_modes}) == len(target.power_modes)


def test_only_what_tensorrt_rtx_knows_has_a_stack_of_it() -> None:
    """Its builds are refused for other capabilities, so a file must not promise them."""
    for target in load_all():
        rtx = any(stack.backend == "tensorrt_rtx" for stack in target.stacks)
        assert rtx == (target.compute_capability in ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")), target.name


def test_l4_has_its_data_sheets_figures() -> None:
    target = load("l4")
    assert (target.compute_capability, target.memory_bytes, target.bandwidth_bytes_per_s) == (
        "8.9",
        24 * 2**30,
        3 * 10**11,
    )
    # nvidia-smi counts 23034 MiB, of which a CUDA context takes 512.
    assert target.usable_bytes == (23034 - 512) * 2**20


def test_the_cpu_leaves_what_is_measured_on_the_spot_open() -> None:
    target = load("cpu")
    assert (target.compute_capability, target.memory_bytes, target.bandwidth_bytes_per_s) == (None, None, None)


def test_an_unknown_name_gets_the_list_and_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"did you mean 'rtx-4090'\? there are: a10, .*t4"):
        load("RTX_4090")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"box"', '"crate"', "box.toml: name: expected 'box'"),
        ("title", "tittle", "unknown key 'tittle'"),
        ('title = "A box"', "", "missing key 'title'"),
        ('"A box"', '""', "title: expected something"),
        ('"datacenter"', '"rack"', "kind: expected one of cpu, datacenter"),
        ('"tensorrt_rtx"', '"onnxruntime"', "backend: expected onnxruntime on a CPU"),
        ('"int8"', '"int9"', r"types\[1\]: expected one of float32"),
        ('"8.9"', '"sm89"', "compute_capability: expected a form like"),
        ('compute_capability = "8.9"', "", "compute_capability: expected a value"),
        ("24_000_000_000", "0", "memory_bytes: expected a positive number"),
        ("24_000_000_000", '"24 GB"', "memory_bytes: expected an integer, found '24 GB'"),
        ("300_000_000_000", "-1", "bandwidth_bytes_per_s: expected a positive number"),
        ('"datacenter"', '"cpu"', "compute_capability: expected nothing"),
        ("title =", "title", "not TOML"),
        ('memory_bytes = "its data sheet"', "", "sources: expected where memory_bytes comes from"),
        ('memory_bytes = "its data sheet"', 'memory = "its data sheet"', "sources: "),
        ('name = "other"', 'name = "rtx"', r"stacks\[1\]: name: expected one of its own, found 'rtx' again"),
        ('source = ["its manual"]', "source = []", r"stacks\[0\]: source: expected at least one"),
        (
            'source = ["its manual"]',
            'source = ["x"]\noperators = "x"',
            r"stacks\[0\]: operators: expected one of tensorrt",
        ),
        ('types = ["float16", "int8"]', "types = []", r"stacks\[0\]: types: expected at least one"),
    ],
)
def test_a_bad_file_names_its_field(old: str, new: str, message: str) -> None:
    assert parse(GOOD, "box").stack().types == ("float16", "int8")
    assert old in GOOD
    with pytest.raises(InputError, match=message) as caught:
        parse(GOOD.replace(old, new, 1), "box")
    assert "targets/data/box.toml" in str(caught.value)


def test_a_stack_is_found_by_its_name_and_an_unknown_one_gets_the_list() -> None:
    target = parse(GOOD, "box")
    assert target.stack("other").backend == "tensorrt"
    with pytest.raises(InputError, match="--stack: box has no stack named 'x'; there are: rtx, other"):
        target.stack("x")
