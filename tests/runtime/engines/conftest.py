"""A fake GPU under the TensorRT engine. What it shows is the engine's bookkeeping, never that TensorRT computes right."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from galerne.runtime.bundle import Bundle
from galerne.runtime.engines import select
from galerne.runtime.engines.tensorrt.library import Library
from galerne.runtime.engines.tensorrt.open import open_tensorrt
from tests.runtime.engines.fake_cuda import FakeDriver
from tests.runtime.engines.fake_tensorrt import FakeTensorRT, enter_engine

NAME = "rtx-4090"


class FakeGpu:
    """Puts a fake driver and a fake TensorRT where the runtime looks for them.

    driver, trt: the ones that the next model opens.
    """

    def __init__(self) -> None:
        self.replace()

    def replace(self, driver: FakeDriver | None = None, **settings: Any) -> None:
        """Take a new GPU, and a TensorRT with these settings."""
        self._settings, self.driver = settings, driver or FakeDriver()
        self.trt = FakeTensorRT(self.driver, **settings)

    def library(self, backend: str) -> Library:
        """Return the library, over a new GPU where the last model closed its own."""
        if self.driver.closed:
            self.replace(**self._settings)
        return Library(self.trt, backend)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A fake GPU for `Model.open(…, engine)`."""
    fake = FakeGpu()
    opened = functools.partial(open_tensorrt, library=fake.library, driver=lambda: fake.driver)
    monkeypatch.setattr(select, "open_tensorrt", opened)
    yield fake


@pytest.fixture
def with_engine(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> Callable[..., Bundle]:
    """Return a function that copies a recipe's bundle and enters a fake engine into it; arguments as `enter_engine`."""

    def make(recipe: str = "fp32", *arguments: Any, **settings: Any) -> Bundle:
        folder = tmp_path / f"bundle-{len(list(tmp_path.iterdir()))}"
        copy = Bundle.open(Path(shutil.copytree(bundle_of(recipe).path, folder)))
        return enter_engine(copy, *arguments, **settings)

    return make
