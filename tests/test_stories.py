"""The built-in stories are endless, different, and never break a rule of grammar they can keep."""

import hashlib
import itertools
import json
import random
import re
from collections import Counter

import pytest

from jaxdecoder.config import DataConfig
from jaxdecoder.data.stories import PLOTS, Story, World, stories, tell_story, world_of
from jaxdecoder.errors import UserError
from tests.runs import script

PRONOUNS = {"he": {"he", "him", "his", "himself"}, "she": {"she", "her", "herself"}}


@pytest.fixture(scope="module")
def told() -> list[Story]:
    rng = random.Random(7)
    return [tell_story(rng) for _ in range(1500)]


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


# --- Worlds ---------------------------------------------------------------------------------------

SMALL = World(("lost", "noise", "garden", "repair", "stuck"), names=6, paragraphs=False)


def test_the_stories_of_the_whole_world_are_what_they_were() -> None:
    """Raise `VERSION` where this changes."""
    text = "\n\n".join(stories(100_000, 5))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "79b838fd73d7b10edb026109b3d3ed78fdfd0e2a7f2a9d1b2016661aad985217"
    )


def test_a_smaller_world_has_only_its_plots_and_names() -> None:
    rng = random.Random(7)
    told = [tell_story(rng, SMALL) for _ in range(1000)]
    assert {story.plot for story in told} == set(SMALL.plots)
    elders = {"Mom", "Dad", "Grandma", "Grandpa", "Aunt May", "Uncle Joe"}
    names = {name for story in told for name, _ in story.cast} - elders
    # Girls, boys, animals of both, and robots; six each.
    assert len(names) == 5 * 6
    assert names >= {"Mia", "Rosa", "Leo", "Omar", "Hazel", "Fern", "Pip", "Moss", "Beep", "Tick"}
    assert not any("\n" in story.text for story in told)
    assert any("\n" in text for text in stories(5000, 7, SMALL._replace(paragraphs=True)))


def test_no_two_of_many_stories_of_a_small_world_are_equal() -> None:
    # In a process where types are not checked, which takes longer than to tell them.
    code = f"""
import random
from jaxdecoder.data.stories import World, tell_story
rng = random.Random(1)
print(len({{tell_story(rng, {SMALL!r}).text for _ in range(10_000)}}))
"""
    process = script("-c", code)
    assert process.output.split()[-1] == "10000", process.output


def test_a_config_says_which_world_its_stories_are_of() -> None:
    assert world_of(DataConfig()) == World()
    fields = {"stories_plots": SMALL.plots, "stories_names": 6, "stories_paragraphs": False}
    assert world_of(DataConfig(**fields)) == SMALL


def test_a_plot_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UserError) as error:
        next(stories(1, world=World(("lost", "lots"))))
    told = f"data.stories_plots: {json.dumps('lots')} should be one of {', '.join(PLOTS)}"
    assert str(error.value) == told
