"""Stop strings: ends a text before the first of them, though they may come split over many pieces."""

from collections.abc import Sequence

from galerne.errors import InputError


class StopFilter:
    """Passes text on up to the first stop string.

    The stop string that starts earliest counts. While one that is not complete yet could start before one that is, the
    filter waits for the text that decides it.

    Attributes:
        stopped: the stop string that ended the text, the longest one complete where several start together; None until
            then. Look at it after `finish` too, which may decide.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for these strings. Raises: InputError if one is empty."""
        for index, stop in enumerate(stops):
            if not stop:
                raise InputError(f"stop[{index}]: expected text, found an empty string; leave it out")
        self.stopped: str | None = None
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Take the next piece and return the text that surely belongs to no stop string; after a stop, nothing."""
        if self.stopped is not None:
            return ""
        text = self._held + text
        start, stop = self._match(text)
        held = self._partial(text, start)
        if stop is not None and held == start:
            self.stopped = stop
            self._held = ""
        else:
            self._held = text[held:]
        return text[:held]

    def finish(self) -> str:
        """Return the text that was held back, as no more comes, up to a stop string in it."""
        text, self._held = self._held, ""
        start, self.stopped = self._match(text) if self.stopped is None else (0, self.stopped)
        return text[:start]

    def _match(self, text: str) -> tuple[int, str | None]:
        """Return the first complete stop string and where it starts; the text's length and None where there is none."""
        start, found = len(text), None
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0 and (found is None or (at, -len(stop)) < (start, -len(found))):
                start, found = at, stop
        return start, found

    def _partial(self, text: str, end: int) -> int:
        """Return the first place before `end` from which the rest of the text begins a stop string; `end` for none."""
        for at in range(max(0, len(text) - self._longest + 1), end):
            if any(stop.startswith(text[at:]) for stop in self._stops):
                return at
        return end
