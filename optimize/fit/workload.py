"""What is asked of a device: a model in a recipe's forms, with so many rows of so many tokens."""

import math
from dataclasses import dataclass

from galerne.runtime.footprint import Forms
from galerne.runtime.manifest import GraphFacts, ModelFacts, layer_kinds
from galerne.runtime.ring import Ring


@dataclass(frozen=True)
class Workload:
    """A model as it is run.

    context: tokens of each row. batch: rows. chunk: the most new tokens of one run.
    ring_context: the longest context, which sizes the rings of layers without a window.
    """

    model: ModelFacts
    forms: Forms
    context: int
    batch: int
    chunk: int
    ring_context: int

    @property
    def tokens(self) -> int:
        """New tokens of the largest run, of all rows."""
        return self.batch * min(self.chunk, self.context)

    def full_slots(self) -> int:
        """Return the slots of one row in all layers' rings at their full size."""
        return self._slots(self._graph().capacities)

    def grown_slots(self) -> int:
        """Return the slots of one row in all layers' rings as the runtime grows them."""
        ring = Ring(self._graph(), 1)
        while (left := self.context - int(ring.positions[0])) > 0:
            ring.capacities = ring.wanted_capacities(min(left, self.chunk))
            ring.positions = ring.positions + ring.next_run(left)
        return self._slots(ring.capacities)

    def longest_ring(self, grown: bool) -> int:
        """Return the slots of the longest ring of one layer, as grown by the runtime or at its full size."""
        full = max(self._graph().capacities)
        return min(full, -(-self.context // 128) * 128) if grown else full

    def _slots(self, capacities: tuple[int, ...]) -> int:
        _, kinds = layer_kinds(self.model.layer_windows)
        return sum(capacities[kind] for kind in kinds)

    def _graph(self) -> GraphFacts:
        windows, _ = layer_kinds(self.model.layer_windows)
        chunk = min(self.chunk, self.ring_context)
        sizes = tuple(
            self.ring_context if window is None else min(window + chunk, self.ring_context) for window in windows
        )
        longest = None if None not in windows and self.ring_context >= max(sizes) else self.ring_context
        return GraphFacts("opset24", 24, "float16", chunk, sizes, longest)


def attention_ops(model: ModelFacts, context: int) -> float:
    """Return the operations of scores and weighted values for all positions of a context, a multiply-add counted as two."""
    keys = 0.0
    for window in model.layer_windows:
        seen = context if window is None else min(window, context)
        keys += seen * (seen + 1) / 2 + (context - seen) * seen
    return 4.0 * model.num_attention_heads * model.head_dim * keys


def product_weights(model: ModelFacts, shapes: list[tuple[int, int]]) -> int:
    """Return the weights of all layers' products."""
    return model.num_hidden_layers * sum(math.prod(shape) for shape in shapes)
