"""Stop strings: found however the text is cut, and never shown in part."""

from __future__ import annotations

import pytest
from headrace.models.stop import StopStrings
from hypothesis import example, given, settings
from hypothesis import strategies as st

STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)
TEXT = st.text(alphabet="abc", max_size=30)
CUTS = st.lists(st.integers(1, 4), min_size=1, max_size=6)


def feed(stops: list[str], text: str, cuts: list[int], include_stop: bool) -> tuple[list[str], str | None]:
    """What is emitted by every push and by the flush, and the stop string found."""
    matcher = StopStrings(stops, include_stop)
    emitted, matched, position, turn = [], None, 0, 0
    while position < len(text):
        size = cuts[turn % len(cuts)]
        emit, matched = matcher.push(text[position : position + size])
        emitted.append(emit)
        position, turn = position + size, turn + 1
    return [*emitted, matcher.flush()], matched


def naive(stops: list[str], text: str, include_stop: bool) -> tuple[str, str | None]:
    """The first place at which the text so far ends with a stop string; the longest that does."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


@given(STOPS, TEXT, CUTS, st.booleans())
@example(["aab", "ab"], "aaab", [1], False)
@example(["abab"], "abaabab", [2], False)
@settings(max_examples=600, deadline=None)
def test_any_cut_gives_what_the_naive_search_gives(
    stops: list[str], text: str, cuts: list[int], include_stop: bool
) -> None:
    emitted, matched = feed(stops, text, cuts, include_stop)
    assert ("".join(emitted), matched) == naive(stops, text, include_stop)


@given(STOPS, TEXT, CUTS)
@settings(max_examples=300, deadline=None)
def test_no_push_shows_a_part_of_a_stop_string_that_comes_later(stops: list[str], text: str, cuts: list[int]) -> None:
    whole, matched = naive(stops, text, False)
    emitted, _ = feed(stops, text, cuts, False)
    shown = ""
    for emit in emitted[:-1]:
        shown += emit
        assert whole.startswith(shown)
        # Held back is at least what could still become a stop string, unless the search is over.
        if matched is None:
            assert not any(shown.endswith(stop) for stop in stops)


@given(STOPS, TEXT)
@settings(max_examples=200, deadline=None)
def test_no_more_is_held_back_than_must_be(stops: list[str], text: str) -> None:
    matcher = StopStrings(stops, False)
    seen = shown = ""
    for char in text:
        emit, matched = matcher.push(char)
        seen, shown = seen + char, shown + emit
        if matched is not None:
            return
        starts = {stop[:length] for stop in stops for length in range(1, len(stop))}
        longest = max((len(start) for start in starts if seen.endswith(start)), default=0)
        assert len(seen) - len(shown) == longest


def test_the_start_of_a_stop_string_waits_until_it_is_known_to_be_none() -> None:
    matcher = StopStrings(["\n\nUser:"], include_stop=False)
    assert matcher.push("Hello.\n\nUs") == ("Hello.", None)
    assert matcher.push("ually") == ("\n\nUsually", None)
    assert matcher.push("\n\nUser: me") == ("", "\n\nUser:")


def test_after_a_match_all_text_is_dropped() -> None:
    matcher = StopStrings(["END"], include_stop=True)
    assert matcher.push("a END b") == ("a END", "END")
    assert matcher.push("more") == ("", "END")
    assert matcher.flush() == ""


def test_the_match_that_ends_first_wins_and_of_those_the_longest() -> None:
    assert feed(["abcd", "bc"], "xabcd", [9], False) == (["xa", ""], "bc")
    assert feed(["c", "abc"], "xabc", [9], False) == (["x", ""], "abc")


def test_characters_outside_the_basic_plane() -> None:
    assert feed(["😀😀"], "a😀b😀😀c", [1], False)[1] == "😀😀"
    assert "".join(feed(["😀😀"], "a😀b😀😀c", [1], False)[0]) == "a😀b"


def test_no_stop_strings_hold_nothing_back() -> None:
    matcher = StopStrings([], include_stop=False)
    assert matcher.push("anything") == ("anything", None)
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""], include_stop=False)


def test_a_long_run_that_almost_matches_is_not_quadratic() -> None:
    # 200,000 characters: a search that restarts at every one would compare 200,000 x 1,000.
    matcher = StopStrings(["a" * 1000 + "b"], include_stop=False)
    emitted = sum(len(matcher.push("a" * 1000).emit) for _ in range(200))
    assert emitted == 200_000 - 1000
    assert matcher.push("b") == ("", "a" * 1000 + "b")
