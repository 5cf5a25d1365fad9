"""The candidate: a bundle in Galerne's runtime, as a Polygraphy runner."""

import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from galerne.export.parity.cases import Case, Plan, RingSize
from galerne.runtime.adapter import Adapter
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines.select import PORTABLE
from galerne.runtime.generate import Generation
from galerne.runtime.model import Model
from galerne.runtime.rows import Rows
from galerne.runtime.steps import feed_steps

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# What a poisoned cache holds, with random signs. A masked slot meets a weight of exactly zero, so values of any finite size
# do no harm; keys stay where their products with a query still fit into float16, since a mask cannot lower an infinite score.
_POISON_KEY, _POISON_VALUE = 1e3, 1e4


class CandidateRunner(BaseRunner):  # type: ignore[misc]
    """Runs a plan's cases in the runtime, with the portable graph (in its exact mode) or an engine as it ships.

    generated: the tokens of each case that generates freely, by its name; there once it has run.
    """

    def __init__(
        self, bundle: Bundle, engine: str, plan: Plan, advance: Callable[[], None], adapter: Path | None = None
    ) -> None:
        super().__init__(name=engine)
        self._bundle, self._engine, self._plan, self._advance = bundle, engine, plan, advance
        self._model: Model | None = None
        self._folder = adapter
        self._adapter: Adapter | None = None
        self.generated: dict[str, Int64] = {}

    def activate_impl(self) -> None:
        """Open the bundle."""
        self._model = Model.open(self._bundle.path, self._engine, exact=self._engine == PORTABLE)
        self._adapter = None if self._folder is None else self._model.load_adapter(self._folder)

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return the one input: the number of the case."""
        return TensorMetadata().add("case", np.int64, (1,))

    def infer_impl(self, feed_dict: dict[str, Any]) -> "OrderedDict[str, npt.NDArray[Any]]":
        """Return the case's outputs by name."""
        assert self._model is not None
        start = time.perf_counter()
        case = self._plan.cases[int(feed_dict["case"][0])]
        if case.greedy_tokens:
            results: list[npt.NDArray[Any]] = [self._tokens(self._model, case)]
        else:
            results = [self._logits(self._model, case, ring) for ring in case.rings]
        self.inference_time = time.perf_counter() - start
        self._advance()
        return OrderedDict(zip(case.outputs, results, strict=True))

    def deactivate_impl(self) -> None:
        """Let go of the model."""
        self._model = self._adapter = None

    def _tokens(self, model: Model, case: Case) -> Int64:
        prompt = self._plan.sequences[0][: case.lengths[0]].tolist()
        generation = Generation(
            model, [prompt], max_new_tokens=case.greedy_tokens, ignore_eos=True, adapter=self._adapter
        )
        self.generated[case.name] = np.array([token for _, token in generation], np.int64)
        return self.generated[case.name]

    def _logits(self, model: Model, case: Case, ring: RingSize) -> Float32:
        rows = model.rows(len(case.lengths), full_ring=ring == "full", adapter=self._adapter)
        if case.poisoned:
            poison(rows)
        sequences = self._plan.sequences[: len(case.lengths)]
        return np.concatenate(feed_steps(rows, sequences, case.steps, self._plan.positions(case)))


def poison(rows: Rows) -> None:
    """Fill empty rings with large finite values.

    Not with NaN: an engine multiplies a masked slot's value by zero, and zero times NaN is NaN by IEEE 754. The contract
    asks a caller for rings of finite values, as those of earlier sequences are.
    """
    rng = np.random.default_rng(0)
    poisoned = []
    for index, ring in enumerate(rows.cache.arrays()):
        signs = rng.choice([-1, 1], ring.shape).astype(np.float32)
        if ring.dtype == np.int8:  # no finite value is larger
            poisoned.append((signs * np.iinfo(np.int8).max).astype(np.int8))
            continue
        values = signs * (_POISON_VALUE if index % 2 else _POISON_KEY)
        bits = ring.dtype == np.uint16  # bfloat16: the upper half of float32
        poisoned.append((values.view(np.uint32) >> 16).astype(np.uint16) if bits else values.astype(ring.dtype))
    rows.cache.fill(poisoned)
