"""The story checker passes whatever the grammar tells, and finds each kind of fault."""

import re
from collections import Counter

import numpy as np
import pytest

from benchmarks.stories import NGram, shares, told_by_the_grammar
from benchmarks.story_grammar import Grammar, Verdict, listen
from jaxdecoder.config import DataConfig
from jaxdecoder.data.stories import stories, world_of
from tests.models import slow

SMALL = DataConfig(
    stories_plots=("lost", "noise", "garden", "repair", "stuck"),
    stories_names=6,
    stories_paragraphs=False,
)
WORLDS = {"whole": DataConfig(), "small": SMALL}
# In 6000 stories of the whole world, and in 500 of the small one, some sentences are never heard.
HEARD = {"whole": 8000, "small": 1500}


def grammar_of(which: str) -> Grammar:
    return listen(world_of(WORLDS[which]), HEARD[which])


@pytest.mark.parametrize("which", ["small", *slow("whole")])
def test_its_own_stories_have_no_fault(which: str) -> None:
    grammar = grammar_of(which)
    for text, ended in told_by_the_grammar(WORLDS[which], 300, seed=1):
        verdict = grammar.judge(text, finished=ended)
        assert verdict.well_formed == verdict.sentences, text
        assert verdict.steady, text
        assert verdict.ended, text


STORY = (
    "In a flat above the bakery lived a small girl named Nora. She was afraid of many things. "
    'One foggy evening, her good friend Max said, "I left the red scarf in the barn. Can you bring '
    'it to me?" What was that? Nora heard a long, low moan, and her heart beat fast. "Help! There '
    'is a ghost!" cried Nora, and she ran away without the red scarf. "There is a ghost in the '
    'barn," she told Max. "I heard it!" Max did not laugh. "Everyone is afraid sometimes," he '
    'said. "Come with me." He gave her a lamp. "You hold it," said Max. "I am right behind you." '
    "Nora held up the light, and what did she see? It was only the wind in the broken door! Nora "
    'began to laugh and picked up the red scarf. "What would I do without you?" Nora asked. Max '
    "only laughed. Nora was not so afraid any more."
)
LAST = "Nora was not so afraid any more."
NEEDED = "One foggy evening, Nora needed the red scarf, but it was still in the barn."


def judge(old: str = "", new: str = "") -> Verdict:
    """The verdict of the story with something else in it."""
    assert STORY.count(old) == 1 or not old
    text = STORY.replace(old, new) if old else STORY
    return grammar_of("small").judge(text)


def told(verdict: Verdict) -> tuple[int, bool, bool]:
    """Sentences that are not well formed, and the rest of the verdict."""
    return verdict.sentences - verdict.well_formed, verdict.steady, verdict.ended


def test_a_story_without_fault_has_none() -> None:
    assert told(judge()) == (0, True, True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Nora began to", "Mia began to"),
        ("Nora began to", "Leo began to"),
        ("Nora began to", "Max began to"),
        ("Max did not laugh", "Leo did not laugh"),
        ("she told Max", "she told Ben"),
    ],
)
def test_a_person_renamed_is_found(old: str, new: str) -> None:
    assert told(judge(old, new)) == (0, False, True)


def test_a_friend_who_was_never_introduced_is_found() -> None:
    introduced = re.search(r'One foggy evening, .*? to me\?"', STORY)
    assert introduced
    assert told(judge(introduced[0], NEEDED)) == (0, False, True)


def test_a_wrong_pronoun_is_found() -> None:
    # In a sentence of its own, of the friend, and beside the name that it stands for.
    assert told(judge("She was afraid", "He was afraid")) == (0, False, True)
    assert told(judge('sometimes," he said', 'sometimes," she said')) == (0, False, True)
    assert told(judge("cried Nora, and she", "cried Nora, and he"))[0] == 1


def test_a_name_that_its_creature_is_never_given_is_found() -> None:
    grammar = grammar_of("small")
    for creature, name, fits in (
        ("girl", "Nora", True),
        ("girl", "Leo", False),
        ("boy", "Leo", True),
        ("bear", "Leo", False),
        ("bear", "Hazel", True),
        ("robot", "Beep", True),
    ):
        sentence = f"Once upon a time, there was a timid {creature} named {name}."
        assert bool(grammar.readings(sentence)) == fits, sentence
    # In two sentences each is the grammar's, but not both together.
    lived = "Long ago, in a flat above the bakery, there lived a small girl. "
    assert told(grammar.judge(f"{lived}Her name was Nora."))[:2] == (0, True)
    assert told(grammar.judge(f"{lived}His name was Leo."))[:2] == (0, False)


@pytest.mark.parametrize(
    "sentence",
    ["The moon ate a sandwich.", "Nora began to laugh and picked up.", "Then then Nora laughed."],
)
def test_a_sentence_that_is_not_the_grammars_is_found(sentence: str) -> None:
    assert told(judge(LAST, f"{sentence} {LAST}")) == (1, True, True)


def test_an_ending_of_another_plot_is_found() -> None:
    other = "After that, when something was too hard, Nora simply asked a friend."
    assert grammar_of("small").readings(other)
    assert told(judge(LAST, other)) == (0, True, False)


def test_a_story_cut_short_is_found() -> None:
    assert told(judge(f" {LAST}")) == (0, True, False)
    assert not grammar_of("small").judge(STORY, finished=False).ended


# --- N-grams --------------------------------------------------------------------------------------


def test_n_grams_cannot_keep_a_cast() -> None:
    texts = list(stories(150_000, 3, world_of(SMALL)))
    order, end = 5, "\n"
    words = [w for text in texts for w in [*[end] * 4, *re.findall(r"[\w'-]+|\W", text)]] + [end]
    vocabulary = sorted(set(words))
    number = {word: i for i, word in enumerate(vocabulary)}
    ngrams = NGram([number[word] for word in words], order, len(vocabulary))
    rng, verdicts = np.random.default_rng(0), []
    for _ in range(20):
        past = [number[end]] * 4
        while len(past) < 5 or (past[-1] != number[end] and len(past) < 700):
            cumulated = np.cumsum(ngrams.probabilities(past))
            past.append(min(int(np.searchsorted(cumulated, rng.random())), len(vocabulary) - 1))
        text = "".join(vocabulary[token] for token in past).strip(end)
        verdicts.append(grammar_of("small").judge(text, finished=past[-1] == number[end]))
    found = shares(verdicts)
    assert found["steady"] < 0.3
    # The checker's own stories would have all of these.
    assert 0.05 < found["well_formed"] < 0.95


def test_n_grams_are_interpolated_as_witten_and_bell_do() -> None:
    tokens, order, size = [0, 1, 0, 2, 0, 1, 1, 0, 1, 0], 3, 4
    ngrams = NGram(tokens, order, size)
    places = range(order - 1, len(tokens))

    def naive(token: int, past: tuple[int, ...]) -> float:
        shorter = naive(token, past[1:]) if past else 1 / size
        after = [tokens[i] for i in places if tuple(tokens[i - len(past) : i]) == past]
        if not after:
            return shorter
        kinds = len(Counter(after))
        return (after.count(token) + kinds * shorter) / (len(after) + kinds)

    for past in ((), (0,), (3,), (0, 1), (1, 1), (2, 3), (1, 0, 1)):
        found = ngrams.probabilities(past)
        assert found.sum() == pytest.approx(1)
        expected = [naive(token, past[-(order - 1) :]) for token in range(size)]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_shares_are_of_sentences_and_of_stories() -> None:
    verdicts = [judge(), judge("Nora began to", "Mia began to")]
    found = shares(verdicts)
    assert found == {"well_formed": 1.0, "steady": 0.5, "ended": 1.0}
