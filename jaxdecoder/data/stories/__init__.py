"""A built-in corpus: an endless sequence of small, grammatical stories from a seed.

Each story has a hero with a name, a pronoun and a trait, a friend, something that the hero wants,
and trouble. A first attempt fails, a second works, and the ending refers to the beginning. To
predict a story well, a model must remember names, pronouns, objects and places over hundreds of
characters. Yet the language is small enough for a model of a million parameters.

A plot, in `plots`, reads like the outline of its stories. `t.tell(...)` tells one of the given
paraphrases. In them `{hero}` is a fact of this story and `[big|huge]` is a free choice. The
friend's pronoun always differs from the hero's, so every "he" and "she" has one owner: `{he} {him}
{his} {himself}` are the hero's words and `{she} {her} {hers}` are the friend's, whatever their
genders.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from jaxdecoder.data.stories.plots import PLOTS
from jaxdecoder.data.stories.telling import Teller
from jaxdecoder.data.stories.telling import upper_first as upper_first
from jaxdecoder.data.stories.world import EVERYTHING, World
from jaxdecoder.data.stories.world import world_of as world_of
from jaxdecoder.errors import UserError

VERSION = 3  # part of the cache key of tokenised text: raise it when any story changes


def stories(n_bytes: int, seed: int = 0, world: World = EVERYTHING) -> Iterator[str]:
    """Yield whole stories until they have at least `n_bytes` bytes together.

    The stories depend only on `seed` and `world`; a larger `n_bytes` continues the same sequence.
    Paragraphs are separated by one newline, so that a caller can separate stories by two.

    Raises:
        UserError: if the world names a plot that does not exist.
    """
    unknown = [plot for plot in world.plots if plot not in PLOTS]
    if unknown:
        raise UserError(
            f"data.stories_plots: {json.dumps(unknown[0])} should be one of {', '.join(PLOTS)}"
        )
    rng = random.Random(seed)
    told = 0
    while told < n_bytes:
        text = tell_story(rng, world).text
        told += len(text)  # ASCII only: one byte per character
        yield text


@dataclass(frozen=True)
class Story:
    """One story, with how it was made."""

    text: str
    plot: str
    hero: str
    cast: tuple[tuple[str, str], ...]  # (name, pronoun) of everyone whom a pronoun may mean
    facts: dict[str, str]  # the text of each `{slot}` of the wordings
    phrases: tuple[tuple[str, str], ...]  # (fact, its wording), or ("", the wording of a sentence)


def tell_story(rng: random.Random, world: World = EVERYTHING) -> Story:
    """Tell one story of a world."""
    t = Teller(rng, world)
    plot = t.pick(world.plots or tuple(PLOTS))
    PLOTS[plot](t)
    cast, phrases = tuple(t.cast), tuple(t.phrases)
    return Story(t.text(), plot, t.facts["hero"], cast, dict(t.facts), phrases)
