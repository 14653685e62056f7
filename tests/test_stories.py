"""The built-in stories are endless, different, and never break a rule of grammar they can keep."""

import itertools
import random
import re
from collections import Counter

import pytest

from jaxdecoder.data.stories import PLOTS, Story, stories, tell_story

PRONOUNS = {"he": {"he", "him", "his", "himself"}, "she": {"she", "her", "herself"}}


@pytest.fixture(scope="module")
def told() -> list[Story]:
    rng = random.Random(7)
    return [tell_story(rng) for _ in range(4000)]


def test_the_same_seed_tells_the_same_stories_and_a_longer_request_continues_them() -> None:
    short, long = list(stories(20_000, seed=3)), list(stories(60_000, seed=3))
    assert long[: len(short)] == short
    assert len(long) > len(short)
    assert next(stories(1, seed=4)) != short[0]


def test_a_request_is_met_with_whole_stories_and_no_more_than_one_too_many() -> None:
    texts = list(stories(50_000))
    sizes = list(itertools.accumulate(len(text.encode()) for text in texts))
    assert sizes[-2] < 50_000 <= sizes[-1]
    assert all(text[-1] in '.!?"' for text in texts)


def test_no_two_stories_are_equal_and_few_begin_alike(told: list[Story]) -> None:
    assert len({story.text for story in told}) == len(told)
    assert len({story.text[:100] for story in told}) > 0.9 * len(told)


def test_every_plot_is_told(told: list[Story]) -> None:
    counts = Counter(story.plot for story in told)
    assert set(counts) == set(PLOTS)
    assert min(counts.values()) > 0.3 * len(told) / len(PLOTS)


def test_the_alphabet_is_plain(told: list[Story]) -> None:
    alphabet = set("".join(story.text for story in told))
    assert all((c.isalpha() and c.isascii()) or c in " \n.,!?'\"-" for c in alphabet)


def test_punctuation_is_in_order(told: list[Story]) -> None:
    for story in told:
        for paragraph in story.text.split("\n"):
            assert paragraph.count('"') % 2 == 0, paragraph
            assert paragraph[-1] in '.!?"', paragraph
            assert not re.search(r"  |\s[.,!?]|[.,!?]{2}|[{}\[\]|]|^\s|\s$", paragraph), paragraph
            for spoken in re.findall(r'"([^"]*)"', paragraph):
                assert spoken[-1] in ".,!?", paragraph


def test_sentences_begin_with_capitals(told: list[Story]) -> None:
    for story in told:
        assert not re.search(r"(^|\n)\"?[a-z]|[.] \"?[a-z]|[.]\" [a-z]", story.text), story.text
        for spoken in re.findall(r'(?:[.!?]|said [A-Za-z ]+[.]) "(.)', story.text):
            assert spoken.isupper(), story.text


def test_articles_agree(told: list[Story]) -> None:
    for story in told:
        assert not re.search(r"\b[Aa] [aeioAEIO]", story.text), story.text
        assert not re.search(r"\b[Aa]n [^aeiouhAEIOU]", story.text), story.text


def test_words_are_not_doubled(told: list[Story]) -> None:
    for story in told:
        assert not re.search(r"\b([a-z]+) \1\b", story.text), story.text


def test_only_the_pronouns_of_the_cast_occur(told: list[Story]) -> None:
    for story in told:
        used = set(re.findall(r"[a-z]+", story.text.lower()))
        known = {pronoun for _, pronoun in story.cast}
        for pronoun, forms in PRONOUNS.items():
            assert pronoun in known or not used & forms, story.text


def test_a_pronoun_has_one_owner(told: list[Story]) -> None:
    for story in told:
        pronouns = [pronoun for _, pronoun in story.cast]
        assert len(set(pronouns)) == len(pronouns), story


def test_the_hero_is_there_from_beginning_to_end(told: list[Story]) -> None:
    for story in told:
        paragraphs = story.text.split("\n")
        assert story.hero in paragraphs[0][:200], story.text
        assert story.hero in paragraphs[-1], story.text
