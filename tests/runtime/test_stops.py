"""The stop filter against a plain search of the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galerne.errors import InputError
from galerne.runtime.stops import StopFilter

_TEXT = st.text("abc", max_size=24)


def _run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    stop_filter = StopFilter(stops)
    shown = "".join(stop_filter.push(piece) for piece in pieces) + stop_filter.finish()
    return shown, stop_filter.stopped


@given(st.lists(st.text("abc", min_size=1, max_size=5), max_size=4), st.lists(_TEXT, max_size=8))
def test_ends_the_text_where_a_search_of_all_of_it_would(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    starts = [whole.find(stop) for stop in stops if stop in whole]
    shown, stopped = _run(stops, pieces)
    assert shown == (whole[: min(starts)] if starts else whole)
    assert (stopped is not None) == bool(starts)
    if stopped is not None:
        assert whole.startswith(stopped, min(starts))


@given(st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4), _TEXT)
def test_whole_text_names_the_longest_of_those_that_start_together(stops: list[str], text: str) -> None:
    _, stopped = _run(stops, [text])
    found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    assert stopped == (min(found)[2] if found else None)


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.text("ab", max_size=20))
def test_holds_nothing_back_that_cannot_begin_a_stop(stops: list[str], text: str) -> None:
    stop_filter = StopFilter(stops)
    shown = "".join(stop_filter.push(character) for character in text)
    if stop_filter.stopped is None:
        held = text[len(shown) :]
        assert text.startswith(shown)
        assert held == "" or any(stop.startswith(held) or stop in held for stop in stops)


def test_shows_no_part_of_a_split_stop_and_drops_what_follows() -> None:
    stop_filter = StopFilter(["</end>"])
    assert [stop_filter.push(piece) for piece in ["Hi <", "/e", "nd", "> more", "more"]] == ["Hi ", "", "", "", ""]
    assert stop_filter.stopped == "</end>"
    assert stop_filter.finish() == ""


def test_gives_back_what_turns_out_to_be_no_stop() -> None:
    stop_filter = StopFilter(["###"])
    assert [stop_filter.push(piece) for piece in ["a#", "#b", "##"]] == ["a", "##b", ""]
    assert stop_filter.finish() == "##"
    assert stop_filter.stopped is None


def test_does_not_wait_for_a_longer_stop_from_the_same_place() -> None:
    stop_filter = StopFilter(["\n\n", "\n"])
    assert stop_filter.push("line\n") == "line"
    assert stop_filter.stopped == "\n"


def test_waits_for_a_stop_that_may_start_earlier() -> None:
    stop_filter = StopFilter(["bc", "abcd"])
    assert stop_filter.push("xabc") == "x"
    assert stop_filter.stopped is None
    assert stop_filter.push("!") == "a"
    assert stop_filter.stopped == "bc"


def test_finish_decides_an_overlap_that_nothing_followed() -> None:
    assert _run(["bc", "abcd"], ["xabc"]) == ("xa", "bc")


def test_refuses_an_empty_stop() -> None:
    with pytest.raises(InputError, match=r"stop\[1\]: expected text"):
        StopFilter(["a", ""])
