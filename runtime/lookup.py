"""Drafts tokens from the text itself, for lossless speculation: what followed the same few tokens before may follow again.

Source: prompt lookup decoding (A. Saxena, 2023), and speculative decoding (Leviathan et al., arXiv 2211.17192) for the check:
the model runs over the draft at once, and only tokens that it would have chosen itself are kept.
"""

from collections.abc import Iterable

# A draft continues the last place where the text's newest tokens stood: the longest of these matches that is found.
_LONGEST_MATCH, _SHORTEST_MATCH = 4, 2
_FIRST_DRAFT = 4


class PromptLookup:
    """The text so far of one row, indexed by its runs of tokens.

    A wrong draft costs the time of checking it, so a draft is as long as the ones before were good: one that is kept whole
    doubles the next, up to `most`; one that is not sets it to what was kept and one more.
    """

    def __init__(self, most: int, tokens: Iterable[int] = ()) -> None:
        """Start with a text. `most` is the longest draft in tokens."""
        self._most, self._length = most, min(most, _FIRST_DRAFT)
        self._tokens: list[int] = []
        # Where a run of tokens was followed last: the index behind it.
        self._behind: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token to the text."""
        # The run that ends before this token is entered now, so that a lookup does not find the text's own end.
        for size in range(_SHORTEST_MATCH, min(_LONGEST_MATCH, len(self._tokens)) + 1):
            self._behind[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def draft(self, limit: int) -> list[int]:
        """Return at most `limit` tokens that may follow the text; none where its end has not stood before."""
        count = min(limit, self._length)
        if count > 0:
            for size in range(min(_LONGEST_MATCH, len(self._tokens)), _SHORTEST_MATCH - 1, -1):
                start = self._behind.get(tuple(self._tokens[-size:]))
                if start is not None:
                    return self._tokens[start : start + count]
        return []

    def kept(self, drafted: int, kept: int) -> None:
        """Learn how many tokens of a draft were right."""
        if drafted:
            self._length = min(self._most, 2 * self._length if kept == drafted else kept + 1)
