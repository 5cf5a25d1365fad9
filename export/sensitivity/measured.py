"""What a mix of formats does to a model's answers on text that it was not chosen by: measured, in transformers."""

from galerne.export.parity.streamed import StreamedModel
from galerne.export.quality.distance import Distance, Int64, distance
from galerne.export.quality.quality import source_logits
from galerne.optimize.quantize.recipe import Recipe


class Measure:
    """Compares a model with rounded weights with the same model without, on the same text.

    tokens: how many there are.
    """

    def __init__(self, streamed: StreamedModel, ids: Int64) -> None:
        """Run the source. `ids` is [sequences, S] int64."""
        self._streamed, self._ids = streamed, ids
        self.tokens = int(ids.size)
        self._vocab_size = int(streamed.model.config.vocab_size)
        streamed.rounding = None
        self._known: dict[Recipe, Distance] = {}
        self._expected = [logits for _, logits in source_logits(streamed, ids, self._vocab_size)]

    def distance(self, recipe: Recipe) -> Distance:
        """Return how far the model is from its source when its weights are rounded by a recipe."""
        if recipe not in self._known:
            self._streamed.rounding = recipe
            found = source_logits(self._streamed, self._ids, self._vocab_size)
            parts = [
                distance(ids, expected, logits) for expected, (ids, logits) in zip(self._expected, found, strict=True)
            ]
            self._known[recipe] = Distance.join(parts)
            self._streamed.rounding = None
        return self._known[recipe]
