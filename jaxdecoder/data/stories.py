"""A built-in corpus: an endless, seeded supply of small, grammatical stories.

Each story has a hero with a name, a pronoun and a trait, a friend, something the hero wants,
trouble, a first attempt that fails and a second that works, and an ending that remembers the
beginning. To predict one well, a model has to carry names, pronouns, objects and places over
hundreds of characters, and yet the language is small enough for a model of a million parameters.

A plot below reads as the outline of its stories. `t.tell(...)` tells one of the given paraphrases;
in them `{hero}` is a fact of this story and `[big|huge]` a free choice. The friend's pronoun always
differs from the hero's, so every "he" and "she" has one owner: `{he} {him} {his} {himself}` are the
hero's words and `{she} {her} {hers}` the friend's, whatever their genders.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeVar

from jaxdecoder.data import story_words as words
from jaxdecoder.data.story_words import Kind, Trait

VERSION = 1  # part of the cache key of tokenised text: raise it when any story changes

T = TypeVar("T")


def stories(n_bytes: int, seed: int = 0) -> Iterator[str]:
    """Yields whole stories until at least `n_bytes` bytes have been yielded.

    The order depends on `seed` alone: asking for more continues the same sequence. Paragraphs are
    separated by one newline, so that a caller can separate stories by two.
    """
    rng = random.Random(seed)
    told = 0
    while told < n_bytes:
        text = tell_story(rng).text
        told += len(text)  # ASCII only: one byte a character
        yield text


@dataclass(frozen=True)
class Story:
    text: str
    plot: str
    hero: str
    cast: tuple[tuple[str, str], ...]  # (name, pronoun) of everyone who is ever a pronoun


def tell_story(rng: random.Random) -> Story:
    t = Teller(rng)
    plot = t.pick(PLOTS)
    plot(t)
    return Story(t.text(), plot.__name__, t.facts["hero"], tuple(t.cast))


# --- Telling -------------------------------------------------------------------------------------


class Facts(dict[str, str]):
    """What is true in one story. `{He}` is `{he}` at the beginning of a sentence."""

    def __missing__(self, key: str) -> str:
        if not key[0].isupper():
            raise KeyError(key)
        return upper_first(self[key[0].lower() + key[1:]])


@cache
def spell_out(template: str) -> tuple[str, ...]:
    """All choices of a template: "a [big|huge] [tree|bush]" has four."""
    parts = re.split(r"\[([^\]]*)\]", template)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return tuple("".join(choice) for choice in product(*choices))


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def a(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


class Teller:
    """Collects the sentences of one story, and the facts that they must agree with."""

    def __init__(self, rng: random.Random) -> None:
        self.random = rng.random
        self.facts = Facts()
        self.cast: list[tuple[str, str]] = []
        self.paragraphs: list[list[str]] = [[]]

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def fill(self, template: str) -> str:
        return self.pick(spell_out(template)).format_map(self.facts)

    def know(self, **facts: str) -> None:
        for name, template in facts.items():
            self.facts[name] = self.fill(template)

    def tell(self, *paraphrases: str) -> None:
        self.paragraphs[-1].append(upper_first(self.fill(self.pick(paraphrases))))

    def perhaps(self, *paraphrases: str) -> None:
        if self.chance(0.5):
            self.tell(*paraphrases)

    def paragraph(self) -> None:
        self.paragraphs.append([])

    def text(self) -> str:
        return "\n".join(" ".join(sentences) for sentences in self.paragraphs)


# --- Casting and opening -------------------------------------------------------------------------

Hero = tuple[Kind, Sequence[str], str]  # kind, names, pronoun
CHILDREN: tuple[Hero, ...] = ((words.GIRL, words.GIRLS, "she"), (words.BOY, words.BOYS, "he"))
BEASTS: tuple[Hero, ...] = tuple(
    hero
    for kind in words.ANIMALS
    for hero in ((kind, words.ANIMALS_SHE, "she"), (kind, words.ANIMALS_HE, "he"))
)
MACHINES: tuple[Hero, ...] = ((words.ROBOT, words.ROBOTS, "it"),)


def cast_hero(t: Teller, unlike: str = "", robots: bool = True) -> Kind:
    """Chooses who the story is about; a creature with the skill `unlike` has no such trouble."""
    while True:
        dice = t.random()
        group = CHILDREN if dice < 0.5 else BEASTS if dice < 0.9 or not robots else MACHINES
        kind, names, pronoun = t.pick(group)
        if not unlike or unlike not in kind.skills:
            break
    name = t.pick(names)
    he, him, his, himself = words.PRONOUNS[pronoun]
    t.know(hero=name, kind=kind.noun, he=he, him=him, his=his, himself=himself)
    t.know(hand=kind.hand, hands=kind.hands, home=t.pick(kind.homes))
    t.cast.append((name, pronoun))
    return kind


def cast_friend(t: Teller, hero: Kind, skill: str = "", peer: bool = False) -> Kind:
    """Chooses a friend or an elder whose pronoun differs from the hero's."""
    heroes = t.cast[0][1]
    pronoun = {"he": "she", "she": "he"}.get(heroes) or t.pick(("he", "she"))
    kind = words.GIRL if pronoun == "she" else words.BOY
    names = words.GIRLS if pronoun == "she" else words.BOYS
    if hero in words.ANIMALS:
        kind = t.pick(words.ANIMALS)
        while kind is hero or (skill and skill not in kind.skills):
            kind = t.pick(words.ANIMALS)
        name = t.pick(words.ANIMALS_SHE if pronoun == "she" else words.ANIMALS_HE)
        a_friend = t.pick(
            ("{his} friend {friend} the {friend_kind}", "{his} [best|good] friend {friend}")
        )
    elif hero is words.ROBOT or peer or t.chance(0.4):
        name = t.pick(names)
        while name == t.facts["hero"]:
            name = t.pick(names)
        a_friend = t.pick(("{his} friend {friend}", "{his} [best|good] friend {friend}"))
    else:
        name, a_friend = t.pick(words.ELDERS[pronoun])
    she, her, hers, herself = words.PRONOUNS[pronoun]
    t.know(friend=name, friend_kind=kind.noun, she=she, her=her, hers=hers, herself=herself)
    t.know(a_friend=a_friend)
    t.cast.append((name, pronoun))
    return kind


def open_story(t: Teller, kind: Kind, trait: Trait) -> None:
    """Who the hero is, where the hero lives, and the trait that will matter."""
    named = t.chance(0.4)
    adjectives = f"{trait.adjective} {kind.noun}"
    if not named or t.chance(0.5):
        adjectives = f"{t.pick(kind.adjectives)} {kind.noun}"
    t.know(a_kind=a(adjectives))
    t.tell(
        "Once upon a time, there was {a_kind} named {hero}. {He} lived in {home}.",
        "Once upon a time, {a_kind} named {hero} lived in {home}.",
        "In {home} lived {a_kind} named {hero}.",
        "{hero} was {a_kind} who lived in {home}.",
        "There once was {a_kind} called {hero}, who lived in {home}.",
        "Long ago, in {home}, there lived {a_kind}. {His} name was {hero}.",
        "This is the story of {hero}, {a_kind} from {home}.",
    )
    if trait.adjective not in adjectives or t.chance(0.5):
        t.tell(*trait.shown)


def set_day(t: Teller, *weathers: str) -> None:
    """One weather and one time of day for the whole story."""
    weather = t.pick(weathers or ("sunny", "windy", "cloudy"))
    time = t.pick(("morning", "afternoon"))
    t.know(when=f"one {weather} {time}", sky=t.pick(words.SKIES[weather]))
    t.know(time=time, close=t.pick(words.CLOSES[time]))


def know_thing(t: Teller, noun: str, adjectives: Sequence[str] = words.COLORS) -> None:
    """The object of the story: `{noun}` is a kite, `{thing}` a red kite."""
    thing = f"{t.pick(adjectives)} {noun}"
    t.know(noun=noun, thing=thing, a_thing=a(thing))


HELLOS = (
    'Just then {a_friend} came by. "Why are you so sad?" {she} asked.',
    '{a_friend} saw {him} and came over. "What is the matter?" asked {friend}.',
    'Soon {a_friend} came along. "What happened, {hero}?" {she} asked.',
    '"What is wrong?" asked a voice. It was {a_friend}.',
)
THANKS = (
    '"Thank you, {friend}!" said {hero}.',
    '"Thank you for your help," said {hero}, and {he} hugged {friend}.',
    '"I could not have done it without you," {hero} told {friend}.',
    "{hero} thanked {friend} again and again.",
)
HOMEWARD = (
    "{close}, they walked home together.",
    "{close}, they went home, happy and tired.",
    "{close}, {hero} and {friend} sat side by side and laughed about it.",
)


# --- Plots ---------------------------------------------------------------------------------------


def lost(t: Teller) -> None:
    """A dear thing is lost; a friend asks where the hero was, and there it is."""
    kind = cast_hero(t)
    cast_friend(t, kind)
    noun, dear = t.pick(words.TREASURES)
    know_thing(t, noun)
    place = t.pick(words.PLACES)
    did, doing, spot = t.pick(place.doings)
    t.know(dear=dear, place=place.name, did=did, doing=doing, spot=spot)
    first = int(t.random() * len(place.decoys))
    t.know(decoy=place.decoys[first], decoy2=place.decoys[first - 1])
    set_day(t)
    trait = t.pick((words.FORGETFUL, words.CARELESS, words.CURIOUS))

    open_story(t, kind, trait)
    t.tell(
        "More than anything, {hero} loved {his} {thing}. {dear}",
        "{His} favorite thing was {a_thing}. {dear}",
        "{hero} had {a_thing} and took it everywhere. {dear}",
    )
    t.paragraph()
    t.tell(
        "{when}, {hero} went to {place} with {his} {thing}. {sky}",
        "{when}, {hero} took {his} {thing} to {place}.",
        "{when}, {hero} carried {his} {thing} all the way to {place}.",
    )
    t.tell(
        "There {he} {did} and forgot about everything else.",
        "{hero} put the {noun} down and {did} [for a long time|for an hour].",
        "{hero} {did}, and {he} had a lot of fun.",
    )
    t.tell(
        "But when {he} wanted to go home, the {noun} was gone!",
        "Then {hero} looked at {his} {hands}. They were empty. The {noun} was gone!",
        "When it was time to leave, {hero} could not find the {noun}.",
    )
    t.perhaps(
        '"Oh no!" cried {hero}. "Where is my {noun}?"',
        '"My {noun}!" {he} cried. "I have lost it!"',
    )
    t.tell(
        "{hero} looked {decoy}, but there was only [dust|an old leaf|a snail|a wet sock].",
        "First {hero} searched {decoy}. {He} found [a nail|a feather|a button], but no {noun}.",
        "{hero} ran around and looked {decoy}. The {noun} was not there.",
    )
    t.perhaps("Then {he} looked {decoy2}, but the {noun} was not there [either|at all].")
    t.tell(
        "{hero} sat down and [began to cry|felt very sad|put {his} head in {his} {hands}].",
        "{hero} did not know what to do.",
    )
    t.paragraph()
    t.tell(*HELLOS)
    t.tell(
        '"I lost my {thing}," said {hero}.',
        '"My {noun} is gone," {hero} said. "I looked {decoy}, but it was not there."',
        '"I cannot find my {thing}," {he} answered.',
    )
    t.tell(
        '"Think back," said {friend}. "What did you do here today?"',
        '{friend} thought for a moment. "When did you have it last?" {she} asked.',
        '"Running around does not help," said {friend}. "Where were you before?"',
    )
    t.tell(
        '{hero} closed {his} eyes and thought. "I was {doing}," {he} said.',
        '"I had it when I was {doing}," said {hero} slowly.',
        '"Let me think," said {hero}. "I was {doing}!"',
    )
    t.tell(
        "They went back together, and there, {spot}, lay the {thing}.",
        'They walked back and looked {spot}. "There it is!" shouted {hero}.',
        "{friend} took {him} by the {hand}, and they went back. The {thing} was {spot}!",
    )
    t.paragraph()
    t.perhaps("{hero} held the {noun} tight.", "{hero} jumped for joy.")
    t.tell(*THANKS)
    t.perhaps('"You found it yourself," said {friend}. "You only had to think."', *HOMEWARD)
    t.tell(*trait.changed)


def stuck(t: Teller) -> None:
    """A toy is out of reach; the hero alone fails, a friend has the tool or the skill."""
    mishap = t.pick(words.MISHAPS)
    kind = cast_hero(t, unlike=mishap.skill)
    skilled = bool(mishap.skill) and kind in words.ANIMALS and t.chance(0.5)
    cast_friend(t, kind, skill=mishap.skill if skilled else "")
    set_day(t, mishap.weather)
    know_thing(t, mishap.noun)
    t.know(to=mishap.to, at=mishap.at, where=mishap.where, why=mishap.why, tool=mishap.tool)
    t.know(play=mishap.play, stuck=mishap.stuck, a_try=t.pick(mishap.tries))
    t.know(rescue=mishap.skilled if skilled else mishap.rescue)
    trait = t.pick((words.STUBBORN, words.IMPATIENT))

    open_story(t, kind, trait)
    t.tell(
        "{hero} had {a_thing}, and {he} loved to {play} {at}.",
        "{His} favorite toy was {a_thing}.",
        "For {his} birthday, {hero} had been given {a_thing}.",
    )
    t.paragraph()
    t.tell(
        "{when}, {hero} went to {to} to {play}. {sky}",
        "{when}, {hero} took the {noun} to {to}. {sky}",
        "{when}, {hero} was {at}. {sky} It was a fine {time} to {play}.",
    )
    t.tell(
        "{stuck}.",
        "At first all went well. Then it happened. {stuck}.",
        "Suddenly there was trouble. {stuck}.",
    )
    t.perhaps('"Come back!" shouted {hero}.', '"Oh no, my {noun}!" cried {hero}.')
    t.tell(
        "{a_try}",
        "{hero} tried to get the {noun} back. {a_try}",
        '"I will get it," said {hero}. {a_try}',
    )
    t.perhaps(
        "It was no use.", "{hero} stamped {his} foot.", "{He} tried again, but it was no better."
    )
    t.paragraph()
    t.tell(*HELLOS)
    t.tell(
        '"My {noun} is {where}," said {hero}. "It is {why}."',
        '"My {thing} is stuck {where}," {hero} answered. "I cannot get it."',
    )
    if trait is words.STUBBORN:
        t.tell(
            '"Do you want some help?" asked {friend}. {hero} took a deep breath. "Yes, please."',
            '"Shall I help you?" asked {friend}. At last {hero} nodded.',
        )
    else:
        t.tell(
            '"Wait a little," said {friend}. "I know what to do."',
            '"Do not rush," said {friend}. "Let us think first."',
        )
    if not skilled:
        t.tell("{friend} went away and came back with {tool}.", "{She} ran to fetch {tool}.")
    t.tell("{rescue}.")
    t.paragraph()
    t.tell(*THANKS)
    t.perhaps(*HOMEWARD)
    t.tell(
        "The next time {hero} went to {to} with the {thing}, {friend} went with {him}.",
        "The {thing} was safe again.",
        "For the rest of the {time}, they played with the {thing} together.",
    )
    t.tell(*trait.changed)


PLOTS: tuple[Callable[[Teller], None], ...] = (lost, stuck)
