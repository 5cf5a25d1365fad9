"""Drafts from the text so far."""

from galerne.runtime.lookup import PromptLookup


def test_a_draft_is_what_followed_the_longest_match_last() -> None:
    text = [1, 2, 3, 9, 5, 6, 1, 2, 3, 7, 8, 5, 4, 2, 3]
    assert PromptLookup(4, text).draft(4) == [7, 8, 5, 4]  # 2, 3 stood twice; the later place counts
    assert PromptLookup(4, [*text[:-2], 9, 5, 6, 1]).draft(2) == [2, 3]


def test_no_match_no_draft() -> None:
    assert PromptLookup(4, [1, 2, 3, 4]).draft(4) == []
    assert PromptLookup(4, [3]).draft(4) == []
    assert PromptLookup(4).draft(4) == []


def test_a_text_that_only_begins_to_repeat() -> None:
    assert PromptLookup(4, [1, 2, 1, 2]).draft(4) == [1, 2]
    assert PromptLookup(4, [7, 7, 7]).draft(4) == [7]


def test_length_follows_success() -> None:
    lookup = PromptLookup(16, [1, 2, *range(10, 40), 1, 2])
    assert len(lookup.draft(99)) == 4
    lookup.kept(4, 4)
    assert len(lookup.draft(99)) == 8
    lookup.kept(8, 8)
    lookup.kept(16, 16)
    assert len(lookup.draft(99)) == 16
    assert len(lookup.draft(3)) == 3
    assert lookup.draft(0) == [] and lookup.draft(-1) == []
    lookup.kept(16, 1)
    assert len(lookup.draft(99)) == 2
    lookup.kept(0, 0)
    assert len(lookup.draft(99)) == 2
    lookup.kept(2, 0)
    assert len(lookup.draft(99)) == 1
