"""What a person writes becomes options and profiles, and what a stack does not offer is refused in one line."""

import dataclasses
from typing import Any

import pytest

from galerne.errors import InputError
from galerne.optimize.builders.tensorrt.library import is_version, older
from galerne.optimize.builders.tensorrt.options import Options, check_options, profiles, read_options
from galerne.targets.target import Stack, load

WRITTEN: dict[str, Any] = {
    "batch": "1",
    "draft": 0,
    "strip": False,
    "weight_streaming": False,
    "hardware_compatibility": "none",
    "version_compatible": False,
}
A10 = load("a10")
RTX = A10.stack("tensorrt-rtx-1.7")
PLAIN = Stack("tensorrt-10.3", "tensorrt", ("float16",), "primitive", "gpu", ("a test",), version="10.3")
ORIN = dataclasses.replace(A10, name="orin", kind="jetson", compute_capability="8.7", unified_memory=True)


def test_options_as_written() -> None:
    assert read_options(**WRITTEN) == Options()
    assert read_options(**WRITTEN | {"batch": "4"}).batch == (4, 4, 4)
    assert read_options(**WRITTEN | {"batch": "1:2:8", "draft": 5}) == Options((1, 2, 8), 5)
    assert read_options(**WRITTEN | {"strip": True}).weights == "stripped"
    assert read_options(**WRITTEN | {"weight_streaming": True}).weights == "streamed"
    assert read_options(**WRITTEN | {"hardware_compatibility": "ampere_plus"}).hardware_compatibility == "ampere_plus"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": "1:2"}, "--batch: expected MIN:OPT:MAX or one number, found '1:2'"),
        ({"batch": "-1"}, "--batch: expected MIN:OPT:MAX or one number"),
        ({"batch": "0"}, "--batch: expected MIN:OPT:MAX, rising from 1 or more, found '0'"),
        ({"batch": "1:4:2"}, "--batch: expected MIN:OPT:MAX, rising"),
        ({"strip": True, "weight_streaming": True}, "--strip and --weight-streaming: expected one of them"),
        ({"hardware_compatibility": "all"}, "expected one of none, ampere_plus, same_compute_capability, found 'all'"),
    ],
)
def test_options_that_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_options(**WRITTEN | changed)


def test_profiles_follow_from_the_options() -> None:
    assert [p.name for p in profiles(Options(), 1, "tensorrt_rtx")] == ["decode"]
    assert profiles(Options(), 1, "tensorrt_rtx")[0].tokens == (1, 1, 1)
    decode, draft, prefill = profiles(Options((1, 2, 4), 7), 8, "tensorrt")
    assert (decode.tokens, decode.logits) == ((1, 1, 1), (1, 1, 1))
    assert draft.tokens == draft.logits == (1, 8, 8)
    assert (prefill.tokens, prefill.logits) == ((1, 8, 8), (1, 1, 8))
    assert {p.batch for p in (decode, draft, prefill)} == {(1, 2, 4)}
    for draft_tokens in (8, -1):
        with pytest.raises(InputError, match="--draft: expected 0 to 7, found"):
            profiles(Options(draft=draft_tokens), 8, "tensorrt")


@pytest.mark.parametrize(
    ("target", "stack", "options", "message"),
    [
        (
            A10,
            RTX,
            Options(hardware_compatibility="ampere_plus"),
            "--hardware-compatibility: TensorRT-RTX does not have",
        ),
        (A10, RTX, Options(version_compatible=True), "--version-compatible: TensorRT-RTX lacks the lean runtime"),
        (ORIN, PLAIN, Options(hardware_compatibility="ampere_plus"), "TensorRT does not have it on a JetPack"),
        (ORIN, PLAIN, Options(weights="streamed"), "--weight-streaming: the GPU uses the host's memory"),
        (load("t4"), PLAIN, Options(hardware_compatibility="ampere_plus"), "needs compute capability 8.0 .* found 7.5"),
        (A10, PLAIN, Options(hardware_compatibility="same_compute_capability"), "needs TensorRT 10.9 .* found 10.3"),
    ],
)
def test_what_a_stack_does_not_offer(target: Any, stack: Stack, options: Options, message: str) -> None:
    with pytest.raises(InputError, match=f"--target {target.name}, stack {stack.name}: .*{message}") as caught:
        check_options(options, target, stack)
    assert "\n" not in str(caught.value)
    check_options(Options(), target, stack)


def test_versions() -> None:
    assert is_version("10.3.0.26", "10.3")
    assert is_version("10.3", "10.3")
    assert not is_version("10.30.1", "10.3")
    assert older("10.3.0", (10, 13))
    assert not older("11.1.0.4", (10, 13))
