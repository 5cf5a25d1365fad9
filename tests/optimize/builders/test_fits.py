"""What does not fit the target is refused before anything is built."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from galerne.errors import CheckFailed
from galerne.optimize.builders.build import build
from galerne.optimize.builders.fits import check_fit
from galerne.runtime.bundle import Bundle
from galerne.targets.target import load


def test_what_fits_passes(bundle_of: Callable[[str], Bundle]) -> None:
    l4 = load("l4")
    check_fit(bundle_of("fp16"), l4, l4.stack("tensorrt-rtx-1.7"), batch=4)


def test_what_does_not_fit_is_refused_first(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    small = dataclasses.replace(load("l4"), memory_bytes=400_000, reserved_bytes=0)
    with pytest.raises(
        CheckFailed, match=r"as fp16 does not fit l4: it takes .* more than the usable .*--force"
    ) as caught:
        build(bundle_of("fp16"), small, stack=small.stack("tensorrt-rtx-1.7"))
    assert "\n" not in str(caught.value)
    assert not (bundle_of("fp16").path / "engines" / "l4").exists()


def test_a_box_must_hold_the_builder_too(bundle_of: Callable[[str], Bundle]) -> None:
    box = load("jetson-orin-nx-16gb")
    tight = dataclasses.replace(box, memory_bytes=450_000_000, reserved_bytes=0)
    check_fit(bundle_of("fp16"), box, box.stack("jetpack-7.2"))
    with pytest.raises(
        CheckFailed, match="fits jetson-orin-nx-16gb when it is built, but TensorRT takes .* to build it"
    ):
        check_fit(bundle_of("fp16"), tight, tight.stack("jetpack-7.2"))
