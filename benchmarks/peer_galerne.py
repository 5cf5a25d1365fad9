"""Galerne's `cpu` engine, as one process of the benchmark: `python -m benchmarks.peer_galerne BUNDLE …`."""

from benchmarks.measure import Request, measure, read_request
from galerne.runtime.model import Model


class GalerneSession:
    """One row of a bundle; its ring starts small and grows as the runtime does it."""

    def __init__(self, request: Request) -> None:
        # By name, so that an engine that does not fit this machine is an error and not the portable graph's time.
        self._model = Model.open(request.model, "cpu", threads=request.threads)
        self._rows = self._model.rows()

    def reset(self) -> None:
        """Forget the sequence."""
        self._rows = self._model.rows()

    def feed(self, tokens: list[int]) -> int:
        """Append tokens to the sequence and return the likeliest next one."""
        return int(self._rows.feed([tokens])[0].argmax())


if __name__ == "__main__":
    measure(read_request(), "Galerne", GalerneSession)
