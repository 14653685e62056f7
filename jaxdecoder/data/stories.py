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

import json
import random
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple, TypeVar

from jaxdecoder.config import DataConfig
from jaxdecoder.data import story_words as words
from jaxdecoder.data.story_words import Kind, Trait
from jaxdecoder.errors import UserError

VERSION = 3  # part of the cache key of tokenised text: raise it when any story changes

T = TypeVar("T")


class World(NamedTuple):
    """Which stories there are to tell."""

    plots: tuple[str, ...] = ()
    """Names of `PLOTS`; empty: all of them."""
    names: int = 0
    """So many names each of girls, boys and others are given; 0: all of them."""
    paragraphs: bool = True
    """Whether stories have several."""


EVERYTHING = World()


def world_of(data: DataConfig) -> World:
    """The world that a config's stories are from."""
    return World(data.stories_plots, data.stories_names, data.stories_paragraphs)


def stories(n_bytes: int, seed: int = 0, world: World = EVERYTHING) -> Iterator[str]:
    """Yields whole stories until at least `n_bytes` bytes have been yielded.

    The order depends on `seed` and `world` alone: asking for more continues the same sequence.
    Paragraphs are separated by one newline, so that a caller can separate stories by two.

    Raises:
        UserError: if the world has a plot that nobody knows.
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
        told += len(text)  # ASCII only: one byte a character
        yield text


@dataclass(frozen=True)
class Story:
    text: str
    plot: str
    hero: str
    cast: tuple[tuple[str, str], ...]  # (name, pronoun) of everyone who is ever a pronoun
    facts: dict[str, str]  # what each `{slot}` of the wordings came to be
    phrases: tuple[tuple[str, str], ...]  # (fact, its wording), or ("", the wording of a sentence)


def tell_story(rng: random.Random, world: World = EVERYTHING) -> Story:
    t = Teller(rng, world)
    plot = t.pick(world.plots or tuple(PLOTS))
    PLOTS[plot](t)
    cast, phrases = tuple(t.cast), tuple(t.phrases)
    return Story(t.text(), plot, t.facts["hero"], cast, dict(t.facts), phrases)


# --- Telling -------------------------------------------------------------------------------------


class Facts(dict[str, str]):
    """What is true in one story. `{He}` is `{he}` at the beginning of a sentence, and `{a_kite}`
    is `{kite}` with its article."""

    def __missing__(self, key: str) -> str:
        if key[0].isupper():
            return upper_first(self[key[0].lower() + key[1:]])
        if key.startswith("a_"):
            return a(self[key[2:]])
        raise KeyError(key)


@dataclass(frozen=True)
class Beat:
    """One step of a story, in several wordings."""

    paraphrases: tuple[str, ...]
    optional: bool = False


PARAGRAPH = Beat(())


@cache
def outline(script: str) -> tuple[Beat, ...]:
    """Reads a script: "-" begins a beat, "?" one that may be left out, and a blank line breaks the
    paragraph. Further lines are paraphrases of the beat, or the name of a list of them."""
    beats: list[Beat] = []
    for line in textwrap.dedent(script).removeprefix("\n").splitlines():
        mark, wording = line[:2], line[2:]
        wordings = COMMON.get(wording, (wording,))
        if not line:
            beats.append(PARAGRAPH)
        elif mark == "  ":
            beats[-1] = Beat(beats[-1].paraphrases + wordings, beats[-1].optional)
        else:
            beats.append(Beat(wordings, optional=mark == "? "))
    return tuple(beats)


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

    def __init__(self, rng: random.Random, world: World = EVERYTHING) -> None:
        self.random = rng.random
        self.world = world
        self.facts = Facts()
        self.cast: list[tuple[str, str]] = []
        self.paragraphs: list[list[str]] = [[]]
        self.phrases: list[tuple[str, str]] = []

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def given(self, names: Sequence[str]) -> Sequence[str]:
        """Those of these names that there are in this world."""
        return names[: self.world.names or None]

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def fill(self, template: str, fact: str = "") -> str:
        phrase = self.pick(spell_out(template))
        self.phrases.append((fact, phrase))
        return phrase.format_map(self.facts)

    def know(self, **facts: str | tuple[str, ...]) -> None:
        """Fixes facts for the rest of the story; of a tuple, one is true."""
        for name, fact in facts.items():
            self.facts[name] = self.fill(fact if isinstance(fact, str) else self.pick(fact), name)

    def note(self, **facts: str) -> None:
        """Fixes facts that leave no choice."""
        self.facts |= facts
        self.phrases += facts.items()

    def tell(self, script: str) -> None:
        for beat in outline(script):
            if beat is PARAGRAPH:
                if self.world.paragraphs and self.chance(0.75):
                    self.paragraphs.append([])
            elif not beat.optional or self.chance(0.45):
                wording = self.pick(beat.paraphrases)
                self.paragraphs[-1].append(upper_first(self.fill(wording)))
                if "{his_friend}" in wording.lower():  # one is introduced only once
                    self.facts["his_friend"] = self.facts["friend"]

    def text(self) -> str:
        """The story, with a pronoun where a sentence would repeat the name in the one before."""
        text = "\n".join(" ".join(sentences) for sentences in self.paragraphs)
        for name, pronoun in self.cast:
            if pronoun != "it":  # "it" could as well be the ball
                again = rf"\b({name}\b[^.!?\"\n]*[.!]) {name}(?= [a-z])"
                text = re.sub(again, rf"\1 {upper_first(pronoun)}", text)
        return text


# --- Casting and opening -------------------------------------------------------------------------

Hero = tuple[Kind, Sequence[str], str]  # kind, names, pronoun
CHILDREN: tuple[Hero, ...] = ((words.GIRL, words.GIRLS, "she"), (words.BOY, words.BOYS, "he"))
BEASTS: tuple[Hero, ...] = tuple(
    hero
    for kind in words.ANIMALS
    for hero in ((kind, words.ANIMALS_SHE, "she"), (kind, words.ANIMALS_HE, "he"))
)
ROBOTS: tuple[Hero, ...] = ((words.ROBOT, words.ROBOTS, "it"),)
CLOUDS: tuple[Hero, ...] = ((words.CLOUD, words.CLOUDS, "it"),)
CHILDREN_BY = {hero[2]: (hero,) for hero in CHILDREN}
RELATED = (words.GIRL, words.BOY, *words.ANIMALS)  # those who have a family


def cast_hero(t: Teller, *groups: Sequence[Hero], unlike: str = "") -> Kind:
    """Chooses whom the story is about; a creature with the skill `unlike` has no such trouble."""
    kind, names, pronoun = t.pick(t.pick(groups or (CHILDREN, BEASTS, CHILDREN, BEASTS, ROBOTS)))
    if unlike and unlike in kind.skills:
        return cast_hero(t, *groups, unlike=unlike)
    name = t.pick(t.given(names))
    he, him, his, himself = words.PRONOUNS[pronoun]
    t.know(hero=name, kind=kind.noun, he=he, him=him, his=his, himself=himself)
    t.know(hand=kind.hand, hands=kind.hands, home=kind.homes)
    t.cast.append((name, pronoun))
    return kind


def cast_friend(t: Teller, hero: Kind, role: str = "any", skill: str = "") -> None:
    """Chooses a peer, an elder or any of them, with a pronoun that differs from the hero's."""
    pronoun = {"he": "she", "she": "he"}.get(t.cast[0][1]) or t.pick(("he", "she"))
    elder = role == "elder" or (role == "any" and not skill and hero in RELATED and t.chance(0.5))
    beasts = [beast for beast in BEASTS if beast[2] == pronoun and beast[0] is not hero]
    if skill:
        beasts = [beast for beast in beasts if skill in beast[0].skills]
    kind, names, _ = t.pick(beasts if hero in words.ANIMALS else CHILDREN_BY[pronoun])
    name, entrance = t.pick(words.ELDERS[pronoun]) if elder else (t.pick(t.given(names)), "")
    if name == t.facts["hero"]:
        name = names[0] if name != names[0] else names[1]
    she, her, hers, herself = words.PRONOUNS[pronoun]
    t.know(friend=name, friend_kind=kind.noun, she=she, her=her, hers=hers, herself=herself)
    if hero in words.ANIMALS:
        t.know(his_friend=entrance or "{his} friend {friend} the {friend_kind}")
    else:
        t.know(his_friend=entrance or "{his} [|good |best ]friend {friend}")
    t.cast.append((name, pronoun))


def cast_other(t: Teller, hero: Kind) -> None:
    """Chooses somebody who is spoken of by name only."""
    lists = (words.ANIMALS_SHE, words.ANIMALS_HE)
    if hero not in words.ANIMALS:
        lists = (words.GIRLS, words.BOYS)
    given = [name for names in lists for name in t.given(names)]
    known = [name for name, _ in t.cast]
    t.know(other=t.pick([name for name in given if name not in known]))


def open_story(t: Teller, kind: Kind, trait: Trait) -> None:
    """Who the hero is, where the hero lives, and the trait that will matter."""
    named = t.chance(0.4)
    adjectives = f"{trait.adjective} {kind.noun}"
    if not named or t.chance(0.5):
        adjectives = f"{t.pick(kind.adjectives)} {kind.noun}"
    t.note(adjective=adjectives.removesuffix(f" {kind.noun}"), creature=kind.noun)
    t.know(kind="{adjective} {creature}")
    t.know(shown=trait.shown, slips=trait.slips, changed=trait.changed)
    t.tell("""
        - Once upon a time, there was {a_kind} named {hero}. {He} lived {home}.
          Once upon a time, {a_kind} named {hero} lived {home}.
          {home} lived {a_kind} named {hero}.
          {hero} was {a_kind} who lived {home}.
          There once was {a_kind} called {hero}, who lived {home}.
          Long ago, {home}, there lived {a_kind}. {His} name was {hero}.
          This is the story of {hero}, {a_kind} who lived {home}.
          {hero} lived {home}. {He} was {a_kind}.
    """)
    if trait.adjective not in adjectives:
        t.tell("- {shown}")


def set_day(t: Teller, *weathers: str) -> None:
    """One weather and one time of day for the whole story."""
    weather = t.pick(weathers or ("sunny", "windy", "cloudy"))
    time = t.pick(("morning", "afternoon"))
    t.know(when=f"one {weather} {time}", sky=words.SKIES[weather])
    t.know(weather=weather, time=time, close=words.CLOSES[time])


def know_thing(t: Teller, noun: str, adjectives: Sequence[str] = words.COLORS) -> None:
    """The object of the story: `{noun}` is a kite, `{thing}` a red kite."""
    t.note(color=t.pick(adjectives))
    t.know(noun=noun, thing="{color} {noun}")


COMMON = {
    "HELLO": (
        'Just then {his_friend} came by. "Why are you so [sad|upset|quiet]?" {she} asked.',
        '"[Hello|Good day], {hero}!" called {his_friend}. "[Why the long face|Are you all right]?"',
        '{his_friend} saw {him} and came over. "What is the matter?" asked {friend}.',
        'Soon {his_friend} came along. "What happened, {hero}?" {she} asked.',
        '"What is wrong?" asked a voice. It was {his_friend}.',
    ),
    "THANKS": (
        '"Thank you, {friend}!" said {hero}.',
        '"Thank you for your help," said {hero}, and {he} hugged {friend}.',
        '"I could not have done it without you," {hero} told {friend}.',
        "{hero} thanked {friend} again and again.",
        '"What would I do without you?" {hero} asked. {friend} only [smiled|laughed|winked].',
        '{hero} [beamed|grinned]. "You are the best, {friend}," {he} said.',
    ),
    "ON THE WAY": (
        "On the way, {he} [hummed a tune|sang a song|counted the birds|waved to the baker].",
        "On the way, {he} [picked a daisy|met a snail|jumped over a puddle|saw a butterfly].",
        "{hero} [hopped|skipped|whistled] all the way.",
        "{His} [heart was light|step was quick] that {time}.",
    ),
    "HOMEWARD": (
        "{close}, they walked home together.",
        "{close}, they went home, happy and tired.",
        "{close}, {hero} and {friend} sat side by side and laughed about it.",
        "{close}, {hero} told the whole [town|family|village] what had happened.",
        "{close}, they [sang|sat by the fire|rested under a tree] and were glad.",
    ),
}


# --- Plots ---------------------------------------------------------------------------------------


def lost(t: Teller) -> None:
    """A dear thing is lost; a friend asks where the hero was, and there it is."""
    kind = cast_hero(t)
    cast_friend(t, kind)
    noun, dear = t.pick(words.TREASURES)
    know_thing(t, noun)
    place = t.pick(words.PLACES)
    did, doing, spot = t.pick(place.doings)
    while kind.noun in did:  # a duck does not feed the ducks
        did, doing, spot = t.pick(place.doings)
    t.know(dear=dear, place=place.name, did=did, doing=doing, spot=spot)
    first = int(t.random() * len(place.decoys))
    t.know(decoy=place.decoys[first], decoy2=place.decoys[first - 1])
    set_day(t)
    trait = t.pick((words.FORGETFUL, words.CARELESS, words.CURIOUS))
    open_story(t, kind, trait)
    t.tell("""
        - More than anything, {hero} loved {his} {thing}. {dear}
          {His} favorite thing was {a_thing}. {dear}
          {hero} had {a_thing} and took it everywhere. {dear}

        - {when}, {hero} went to {place} with {his} {thing}. {sky}
          {when}, {hero} took {his} {thing} to {place}.
          {when}, {hero} carried {his} {thing} all the way to {place}.
        ? ON THE WAY
        - There {he} {did} and forgot about everything else.
          {hero} put the {noun} down and {did} [for a long time|for an hour].
          {hero} {did}, and {he} [had a lot of fun|did not think of the {noun}].
          {hero} [ate a plum|took a nap|had a rest] first. Then {he} {did} until {he} was tired.
        ? {slips}
        - But when {he} wanted to go home, the {noun} was gone!
          Then {hero} looked around. Where was the {noun}? It was nowhere to be seen.
          When it was time to leave, {hero} could not find the {noun}.
          Later, {hero} reached for the {noun}, but {his} {hand} found nothing.
        ? "Oh no!" cried {hero}. "Where is my {noun}?"
          "My {noun}!" {he} cried. "I have lost it!"
        - {hero} looked {decoy}, but there was only [dust|an old leaf|a snail|a wet sock].
          First {hero} searched {decoy}. {He} found [a nail|a feather|a button], but no {noun}.
          {hero} ran around and looked {decoy}. The {noun} was not there.
        ? Then {he} looked {decoy2}, but the {noun} was not there [either|at all].
        ? {hero} sat down and [began to cry|felt very sad|put {his} head in {his} {hands}].
          {hero} did not know what to do.

        - HELLO
        - "I lost my {thing}," said {hero}.
          "My {noun} is gone," {hero} said. "I looked {decoy}, but it was not there."
          "I cannot find my {thing}," {he} answered.
        - "Think back," said {friend}. "What did you do here today?"
          {friend} thought for a moment. "When did you have it last?" {she} asked.
          "Running around does not help," said {friend}. "Where were you before?"
          "Things do not walk away," said {friend} [calmly|kindly]. "What were you doing?"
        - {hero} closed {his} eyes and thought. "I was {doing}," {he} said.
          "I had it when I was {doing}," said {hero} slowly.
          "Let me think," said {hero}. "I was {doing}!"
        - They went back together, and there, {spot}, lay the {thing}.
          They walked back and looked {spot}. "There it is!" shouted {hero}.
          {friend} took {him} by the {hand}, and they went back. The {thing} was {spot}!
          "Then I know where to look," said {friend}. And really, the {thing} was {spot}.

        ? {hero} held the {noun} tight.
          {hero} jumped for joy.
        ? THANKS
        ? "You found it yourself," said {friend}. "You only had to think."
          HOMEWARD
        - {changed}
    """)


def stuck(t: Teller) -> None:
    """A toy is out of reach; the hero alone fails, a friend has the tool or the skill."""
    mishap = t.pick(words.MISHAPS)
    kind = cast_hero(t, unlike=mishap.skill)
    skilled = bool(mishap.skill) and kind in words.ANIMALS and t.chance(0.5)
    cast_friend(t, kind, skill=mishap.skill if skilled else "")
    set_day(t, mishap.weather)
    know_thing(t, mishap.noun)
    t.know(**vars(mishap))
    t.know(rescue=mishap.skilled if skilled else mishap.rescue)
    trait = t.pick((words.STUBBORN, words.IMPATIENT))
    open_story(t, kind, trait)
    t.tell("""
        - {hero} had {a_thing}, and {he} loved to {play} {at}.
          {His} favorite toy was {a_thing}.
          For {his} birthday, {hero} had been given {a_thing}.
          {hero} had saved [ten|twelve|twenty] coins to buy {a_thing}.
          [A neighbor|An old sailor|A kind tailor] had [made|found|painted] {a_thing} for {him}.

        - {when}, {hero} went to {to} to {play}. {sky}
          {when}, {hero} took the {noun} to {to}. {sky}
          {when}, {hero} was {at}. {sky} It was a fine {time} to {play}.
        - {stuck}.
          At first all went well. Then it happened. {stuck}.
          Suddenly there was trouble. {stuck}.
        ? "Come back!" shouted {hero}.
          "Oh no, my {noun}!" cried {hero}.
        ? {slips}
        - {tries}
          {hero} tried to get the {noun} back. {tries}
          "I will get it," said {hero}. {tries}
        ? It was no use, and {hero} felt [angry|helpless|small].
          {hero} stamped {his} foot.
          {He} tried again, but it was no better.

        - HELLO
        - "My {noun} is {where}," said {hero}. "{why}"
          "My {thing} is stuck {where}," {hero} answered. "I cannot get it."
    """)
    if trait is words.STUBBORN:
        t.tell("""
            - "Do you want some help?" asked {friend}. {hero} took a deep breath. "Yes, please."
              "Shall I help you?" asked {friend}. At last {hero} nodded.
        """)
    else:
        t.tell("""
            - "Wait a little," said {friend}. "I know what to do."
              "Do not rush," said {friend}. "Let us think first."
        """)
    if not skilled:
        t.tell("""
            - {friend} went away and came back with {tool}.
              {She} ran to fetch {tool}.
        """)
    t.tell("""
        - {rescue}.

        - THANKS
        ? HOMEWARD
          The next time {hero} went to {to} with the {thing}, {friend} went with {him}.
          The {thing} was safe again.
          For the rest of the {time}, they played with the {thing} together.
        - {changed}
    """)


def gift(t: Teller) -> None:
    """The hero makes a present, spoils it in a hurry, and makes it again with help."""
    kind = cast_hero(t)
    cast_friend(t, kind)
    cast_other(t, kind)
    reason, wish = t.pick(words.OCCASIONS)
    t.know(reason=reason, wish=wish, **vars(t.pick(words.CRAFTS)))
    set_day(t)
    open_story(t, kind, words.IMPATIENT)
    t.tell("""

        - {reason}. {When}, {hero} wanted to {make} {craft} for {other}.
          {When}, {hero} thought of {other}. {reason}. "I will {make} {craft}," {he} said.
          {reason}. "I will {make} {craft} for {other}," said {hero} {when}.
        - {He} found {gather} and began at once.
          {He} put {gather} on the table.
        ? "Quick, quick!" said {hero}.
          {He} could not wait to see it done.
          "This will not take long," {he} thought.
        - {slip}, and {spoiled}.
          But {slip}. Soon {spoiled}.
        ? "Oh no!" {he} cried. "Now I have nothing for {other}!"
          {hero} wanted to [cry|hide|run away].

        - {his_friend} looked in at the door. "What happened here?" {she} asked.
          {his_friend} came in and saw it all. "What is this?" asked {friend}.
        - "I wanted to {make} {craft} for {other}," said {hero}, "but {spoiled}."
          "It was for {other}," said {hero}, "but {spoiled}."
        ? "That can happen to anyone," said {friend}.
          {friend} smiled a little.
        - "{advice}," {she} said. "Shall we try again?"
          "You were too fast," said {friend}. "{advice}. Let us do it together."
        - This time, {again}, and {result}.
          So they began again. {Again}, and at last {result}.

        - {close}, {hero} brought the {gift} to {other}. "{wish}!" {he} said.
          {close}, {hero} and {friend} went to see {other}. "{wish}!" they called.
        ? "Is that for me?" asked {other}. "[It is wonderful|What a surprise]!"
          "Did you {make} it yourself?" asked {other}. "{friend} helped me," said {hero}.
          {other} [laughed with joy|could hardly believe it|smiled from ear to ear].
        - {changed}
    """)


def quarrel(t: Teller) -> None:
    """Two friends pull at one toy until it breaks; they make up and mend it."""
    kind = cast_hero(t, CHILDREN, BEASTS)
    cast_friend(t, kind, role="peer")
    toy = t.pick(words.TOYS)
    know_thing(t, toy.noun)
    t.know(**vars(toy))
    set_day(t)
    open_story(t, kind, words.BOSSY)
    t.tell("""
        - {His} best friend was {friend}.
          {hero} played with {his_friend} every day.

        - {when}, they found {a_thing} in [an old chest|the attic|the shed].
          {when}, they saw {a_thing} at the market and bought it for both of them.
          {when}, somebody gave them {a_thing} to share.
        - "I want to {play} first!" said {hero}. "No, I do!" said {friend}.
          "It is mine! I saw it first," {hero} said. "No, it is mine!" cried {friend}.
          "I am the one to {play}," said {hero}. "Why always you?" asked {friend}.
        - {hero} pulled on one side, and {friend} pulled on the other. Suddenly {breaks}!
          They pulled and pulled until {breaks}.
          Neither of them let go of the {noun}. Then, with a loud noise, {breaks}.
        - "Now look what you have done!" shouted {friend}, and {she} ran home.
          "It is your fault!" they both said. {friend} went away without another word.
          {friend} had tears in {hers} eyes. {She} turned around and left.
          "I will never play with you again!" said {friend} and slammed the [door|gate].

        - {hero} tried to play alone, but it was [no fun at all|very dull].
          Without {friend}, the {time} was long and gray.
          {hero} sat beside the broken {noun}. {He} missed {friend}.
          {hero} built a tower, but there was nobody to [admire it|knock it down].
        ? "{A_noun} is only {a_noun}," {he} thought, "but {friend} is my friend."
        - {hero} went to {friend} and said, "I am sorry. I only thought of myself."
          So {hero} took the {noun} and knocked at {friend}'s door. "I am sorry," {he} said.
        - "I am sorry too," said {friend}.
          {friend} nodded. "I was wrong too," {she} said.
        - Together they {mend}.
          "Can we fix the {noun}?" asked {hero}. "We can try," said {friend}. They {mend}.

        - "You go first," said {hero}. "No, you!" said {friend}, and they both laughed.
          "Now it is your turn," said {hero}, and {he} gave {friend} the {thing}.
          {close}, {hero} and {friend} played with the {thing} again, each in turn.
        - {changed}
    """)


def noise(t: Teller) -> None:
    """A frightening sound in the dark turns out, by light and with a friend, to be harmless."""
    kind = cast_hero(t)
    cast_friend(t, kind)
    sound = t.pick(words.NOISES)
    while kind.noun in sound.truth or sound.to[4:] in t.facts["home"]:
        sound = t.pick(words.NOISES)
    t.know(**vars(sound), errand=words.ERRANDS, light=words.LIGHTS)
    t.know(when="one [dark|stormy|cold|rainy|foggy] [evening|night]")
    open_story(t, kind, words.TIMID)
    t.tell("""

        - {when}, {hero} had to fetch the {errand} from {to}.
          {when}, {his_friend} said, "I left the {errand} in {to}. Can you bring it to me?"
          {when}, {hero} needed the {errand}, but it was still in {to}.
        ? It was very dark and [quiet|still|cold].
          There was no moon in the sky.
          {He} took a small step, then another.
        - When {hero} came near, {he} heard {sound}.
          Suddenly there was {sound}. {hero} stood still.
          What was that? {hero} heard {sound}, and {his} heart beat fast.
        - "It must be {monster}!" {he} whispered, and {he} ran back as fast as {he} could.
          "Help! There is {monster}!" cried {hero}, and {he} ran away without the {errand}.

        - "Why are you shaking?" asked {his_friend}. "There is {monster} in {to}!" said {hero}.
          "There is {monster} in {to}," {he} told {his_friend}. "I heard it!"
        - "Did you see it?" asked {friend}. "No," said {hero}, "it was too dark."
          "Let us go and look," said {friend}. "I will stay with you."
          {friend} put down {hers} [tea|book|pencil|soup]. "Show me," {she} said.
          {friend} did not laugh. "Everyone is afraid sometimes," {she} said. "Come with me."
        - {friend} lit {light} and took {hero} by the {hand}.
          {She} gave {him} {light}. "You hold it," said {friend}. "I am right behind you."
        ? Step by step, they went back to {to}.
          Slowly they walked into {to}.
        ? There was {sound} again. {hero} wanted to run, but {he} did not.
        - {hero} held up the light, and what did {he} see? It was only {truth}!
          In the light, they saw {truth}. "So that was my monster!" said {hero}.
          "Look there," said {friend}. It was not {monster}. It was {truth}.

        - {hero} [laughed out loud|began to laugh] and picked up the {errand}.
        ? THANKS
        ? "In the dark, small things seem big," said {friend}.
          "You were brave," said {friend}. "You were afraid, and you went anyway."
          They stayed [awake|up] late and told each other [funny|strange|long] stories.
        - {changed}
    """)


def lesson(t: Teller) -> None:
    """The hero wants to learn something, falls, listens, practices, and can do it."""
    task = t.pick(words.LESSONS)
    kind = cast_hero(t, CHILDREN, BEASTS, unlike=task.skill)
    cast_friend(t, kind, skill=task.skill if kind in words.ANIMALS else "")
    t.know(**vars(task))
    set_day(t, task.weather)
    trait = t.pick((words.IMPATIENT, words.STUBBORN, words.SHY))
    open_story(t, kind, trait)
    t.tell("""
        - There was one thing that {hero} wanted to learn. {He} wanted to {verb}.
          More than anything, {hero} wanted to {verb}.
          All {his} friends could {verb}, but {hero} could not.
          {hero} had seen a [sailor|baker|farmer|clown] {verb}, and now {he} wanted to do it too.

        - {when}, {hero} went to {to}. "Today I will {verb}," {he} said.
          {when}, {hero} went to {to} to try. {sky}
        ? ON THE WAY
        - {fails}.
          {hero} did {his} best, but it was hard. {Fails}.
        ? {He} tried again, and it was even worse.
          It happened again and again.
          Somebody laughed.
        - "I will never learn to {verb}!" cried {hero}.
          {hero} wanted to give up.
          "It is too hard for me," {he} said, and {he} sat down.

        - {his_friend} had seen it all. "May I show you how I do it?" {she} asked.
          "Nobody can {verb} on the first day," said {his_friend}.
          {his_friend} sat down next to {him}. "It was hard for me too," {she} said.
    """)
    if trait is words.STUBBORN:
        t.tell("""
            - At first {hero} shook {his} head. Then {he} said, "Please help me."
        """)
    if trait is words.SHY:
        t.tell("""
            - "But everyone will look at me," {hero} whispered. "Only I am here," said {friend}.
        """)
    t.tell("""
        - "{advice}," said {friend}.
          Then {she} told {him} the secret. "{advice}."
        ? {hero} listened and tried once more.
          {hero} got up and did just that.
        ? It went a little better, and then a [bit|lot] better than that.
          They practiced all {time}.
          {He} tried until {he} was out of breath.
        - And then {works}!
          Suddenly {works}.
          At last {works}.

        - "I can {verb}!" shouted {hero}. "I can really {verb}!"
          "Look, {friend}! I can {verb}!" called {hero}.
          {friend} cheered. {hero} had learned to {verb}.
        ? HOMEWARD
        - {changed}
    """)


def race(t: Teller) -> None:
    """Pride comes before a fall, and the rival who stops to help becomes a friend."""
    kind = cast_hero(t, CHILDREN, BEASTS)
    cast_friend(t, kind, role="peer")
    contest = t.pick(words.CONTESTS)
    t.know(**vars(contest), prize=words.PRIZES)
    set_day(t, contest.weather)
    open_story(t, kind, words.PROUD)
    t.tell("""

        - {when}, it was time for {name}. The prize was {prize}.
          {when}, everybody came to see {name}. The winner would get {prize}.
        - "I will win, of course," said {hero}. "You are much too slow, {friend}."
          "You cannot beat me," {hero} told {his_friend}. "Nobody can."
          "Good luck!" said {his_friend}. "I do not need luck," said {hero}.
        - [One, two, three|Ready, steady], go! {hero} {ahead}.
          A bell rang, and {hero} {ahead}.
        - {hero} looked back to laugh at {friend}. But then {he} {fall}.
          {hero} was so sure to win {prize} that {he} did not look ahead. {He} {fall}.
          {hero} waved to the crowd and did not watch the way. Suddenly {he} {fall}.
        ? "Ouch!" cried {hero}.
          The others rushed by.
          Nobody stopped.

        - {friend} came by and stopped. "Are you all right?" {she} asked.
          Then {friend} came along. "Do you need help?" {she} asked.
        - "No," said {hero}, "{trouble}. But you can still win! Go on!"
          "{Trouble}," said {hero}.
        - "A friend is worth more than {prize}," said {friend}.
          "I will not leave you here," said {friend}.
          "Then we will go together," {she} said.
        - {help}.
          So {help}.
        - They came to {goal} last, but they came together.
          Side by side, they reached {goal}.

        - Somebody else won the prize, but {hero} did not mind.
          "{friend} is the real winner," {hero} told everyone.
          There was no prize for the last, but the crowd [cheered|clapped|sang] for both of them.
          The judge smiled and gave {prize} to {friend}. "For a good heart," the judge said.
        ? "I am sorry that I laughed at you," said {hero}.
          THANKS
        - {changed}
    """)


def foundling(t: Teller) -> None:
    """A small animal needs help; the hero asks what it needs, and brings it home."""
    kind = cast_hero(t, CHILDREN)
    cast_friend(t, kind)
    t.know(**vars(t.pick(words.FOUNDLINGS)), spot=words.HIDEOUTS)
    set_day(t, "sunny", "windy", "cloudy", "snowy")
    trait = t.pick((words.CURIOUS, words.SHY))
    open_story(t, kind, trait)
    t.tell("""

        - {when}, {hero} heard a tiny sound {spot}. {He} looked, and there sat {a_noun}.
          {when}, {hero} was on {his} way home. {Spot}, {he} saw {a_noun}.
          It was {a_weather} {time}. {hero} found {a_noun} {spot}.
        - It was {state}.
          The poor little thing was {state}.
        ? "Where is your mother?" asked {hero}.
          "Do not be afraid," said {hero} softly.
        - {hero} gave the {noun} {wrong}, but it turned its head away.
          {hero} ran home and brought {wrong}. The {noun} did not want it.
        ? "Why will you not eat?" asked {hero}.
          {He} did not know what to do.

        - {He} went to ask {his_friend}. "I found {a_noun}, and it does not eat," said {hero}.
          "Can you help me?" {he} asked {his_friend}. "The {noun} does not eat."
    """)
    if trait is words.SHY:
        t.tell("""
            - For once, {hero} spoke loud and clear.
              {He} forgot to be shy.
        """)
    t.tell("""
        - "What did you give it?" asked {friend}. "I gave it {wrong}," said {hero}.
        - {friend} smiled. "{A_noun} does not eat that," {she} said. "Let us try {right}."
          "No wonder," said {friend}. "{A_noun} needs {right}."
        - The {noun} ate it all up.
          This time, the {noun} ate and ate.
          It ate every bit of it.

        - "May I keep it?" asked {hero}. "It has a mother who misses it," said {friend}.
          "Now it must go home," said {friend}. "Its mother is waiting."
        - So they carried the {noun} to {to}, and there was its mother.
          {close}, they took it back to {to}. Its mother was there.
        ? {hero} was a little sad and very glad.
          {hero} waved until {he} could not see the {noun} any more.
          Every week, {hero} went to {to} to visit the {noun}.
        - {changed}
    """)


def greedy(t: Teller) -> None:
    """Too much for one alone is too heavy or too sweet; shared, it is a feast."""
    kind = cast_hero(t, CHILDREN, BEASTS)
    cast_friend(t, kind, role="peer")
    t.know(**vars(t.pick(words.TREATS)))
    set_day(t, "sunny", "cloudy")
    heavy = t.chance(0.5)
    open_story(t, kind, words.GREEDY)
    t.tell("""

        - {when}, {hero} found [many|lots of] {treats} {source}. {sky}
          {when}, {hero} went to look for {treats}. {He} found them {source}.
        - {He} filled {his} {box} to the top.
          {hero} picked and picked until {his} {box} was full.
        - On the way home, {he} met {his_friend}. "May I have some {treats}?" {she} asked.
          {his_friend} came by. "What nice {treats}!" {she} said. "Can you give me a few?"
        - "No," said {hero}. "They are all mine."
          "I need them all," said {hero}, and {he} held the {box} tight.
          "Find your own {treats}," said {hero}.
        ? {friend} looked sad.
          "I only wanted one," said {friend}.

    """)
    if heavy:
        t.tell("""
            - {hero} wanted to run away with the {box}, but it was too heavy. {He} fell.
              The {box} grew heavier with every step. At last {hero} fell over a stone.
            - The {treats} rolled down the road in all directions.
              All the {treats} flew out of the {box} and into the mud.
            - "My {treats}!" cried {hero}. {He} could not pick them all up alone.
            - {friend} did not walk on. {She} knelt down and helped to gather the {treats}.
              Then {friend} came and put the {treats} back into the {box}, one by one.
            - "Why do you help me?" asked {hero}. "Because you need help," said {friend}.
              "I was not nice to you," said {hero}. "No," said {friend}, "but you needed help."
        """)
    else:
        t.tell("""
            - {hero} hid behind a wall and ate all the {treats} alone.
              {hero} ate and ate until only a few {treats} were left in the {box}.
            - Soon {his} belly began to hurt. "Ow, ow!" {he} cried.
              Then {he} felt sick. {His} belly was as tight as a drum.
            - {friend} heard {him} and brought a cup of [mint|warm] tea.
              {friend} came and sat with {him} until the pain was gone.
            - "I ate too much," said {hero}. "With you, it would have been just enough."
              "I wish I had given you half," said {hero}.
              "I am sorry," {he} said. "I was not a good friend to you."
        """)
    t.tell("""

        - "From now on, half of the {treats} are yours," said {hero}.
          The next day, {hero} brought {a_box} of {treats} to {friend}, and they ate together.
          {close}, they shared the rest of the {treats}. "They taste better with you," said {hero}.
          "Let us eat the rest together," said {hero}. {friend} was glad to hear that.
        - {changed}
    """)


def repair(t: Teller) -> None:
    """Something useful breaks; a foolish repair makes it worse, the right tool makes it well."""
    kind = cast_hero(t)
    cast_friend(t, kind)
    broken = t.pick(words.REPAIRS)
    know_thing(t, broken.noun, ("old", "little", "big", "green", "blue", "red"))
    t.know(**vars(broken))
    set_day(t)
    trait = t.pick((words.CURIOUS, words.STUBBORN, words.IMPATIENT))
    open_story(t, kind, trait)
    t.tell("""
        - At home there was {a_thing}. It {use}.
          {hero} was proud of {his} {thing}, which {use}.

        - {when}, the {thing} {breaks}.
          But {when}, something went wrong. The {noun} {breaks}.
          It was a quiet, {weather} {time} until the {noun} {breaks}.
        ? "What now?" asked {hero}.
          "I can fix it," said {hero}.
        ? {slips}
        - {hero} {fool}, but {worse}.
          First {hero} {fool}. That did not help, for {worse}.
        ? {hero} scratched {his} head.
          Now the {noun} looked worse than before.

        - {hero} went to {his_friend}. "Our {noun} is broken," {he} said.
          {his_friend} saw it. "What happened to the {noun}?" asked {friend}.
        - "It {breaks}," said {hero}. "I {fool}, but {worse}."
          "I {fool}," {hero} said, "but {worse}."
        - {friend} tried not to laugh. "What we need is {tool}," {she} said.
          "Let me see," said {friend}. "I think it needs {tool}."
        ? "How does it work?" asked {hero}. "Watch closely," said {friend}.
        - {She} brought {tool}, and {hero} {mend}.
          They looked in the [shed|garage|cellar] and found {tool}. Then they {mend}.

        - {close}, the {thing} was as good as new.
          And see, the {noun} was as good as before!
          "Hooray!" shouted {hero}. The {thing} was whole again.
        - THANKS
        - {changed}
    """)


def garden(t: Teller) -> None:
    """A seed cannot be hurried; the hero learns to wait, and it grows."""
    kind = cast_hero(t)
    cast_friend(t, kind)
    seed, plant, feast = t.pick(words.SEEDS)
    t.know(seed=seed, plant=plant, feast=feast)
    set_day(t, "sunny", "cloudy")
    open_story(t, kind, words.IMPATIENT)
    t.tell("""

        - {when}, {his_friend} gave {him} {a_seed} seed.
          {when}, {hero} found {a_seed} seed in {his} [bag|box|basket|pocket|drawer].
        - "I will plant it," said {hero}, "and soon I will have {plant}!"
          {hero} wanted to have {plant}.
        - {He} dug a hole [behind the house|by the fence|near the wall] and put the seed in.
          {He} [borrowed a spade|rolled up {his} sleeves] and put the seed into the ground.
        - The next day, nothing had happened. {hero} dug up the seed to look at it.
          An hour later, {he} looked at the ground. "Grow!" said {hero}. Nothing moved.
          {hero} poured so much water on the seed that it floated away in the mud.
        ? "This seed is no good," {he} said.
          {hero} stamped {his} foot.

        - "What are you doing?" asked {his_friend}. "My seed does not grow," said {hero}.
          "Why does my {seed} not grow?" {he} asked {his_friend}.
        - "A seed needs water, sun, and time," said {friend}. "Most of all, it needs time."
          "It is sleeping," said {friend}. "If you wake it every day, it cannot grow."
        - They put the seed back into the soft earth and gave it a little water.
          Together they planted the seed again, and {friend} put a small sign next to it.
        - Every day, {hero} watered the ground and waited.
          {hero} waited one week, and then another. It was hard, but {he} did not dig.
          The sun shone, the rain fell, and {hero} waited.
        ? One day, a tiny green leaf came out of the ground.
          A [robin|snail|beetle|bee] came to look, and {hero} told the news.
          "Good night, seed," {he} said each evening.

        - At the end of the summer, there was {plant}.
          And then, at last, there was {plant}!
        - {feast}.
          {hero} called {friend}. {feast}.
        ? "It was worth the wait," said {hero}.
          "You see," said {friend}, "it only needed time."
        - {changed}
    """)


def honest(t: Teller) -> None:
    """Something breaks, a lie weighs heavily, and the truth makes it light."""
    kind = cast_hero(t, CHILDREN, BEASTS)
    cast_friend(t, kind, role="elder")
    noun, at, toy, hit = t.pick(words.BREAKABLES)
    know_thing(t, noun)
    t.know(at=at, toy=toy, hit=hit, hiding=words.HIDING_PLACES)
    set_day(t, "rainy", "snowy")
    open_story(t, kind, words.CARELESS)
    t.tell("""
        - {his_friend} had {a_thing} and loved it very much.
          There was {a_thing} {at}. "Be careful with it," {his_friend} always said.

        - {when}, {hero} had to stay inside. {sky} {He} played with {his} {toy}.
          It was {a_weather} {time}, and {hero} played with {his} {toy} in the house.
        - Then it happened. The {toy} {hit} the {thing}. Crash!
          Suddenly the {toy} {hit} the {thing}, and it broke into [ten|a hundred|many] pieces.
        - {hero} was afraid. {He} hid the pieces {hiding}.
          "Nobody must see this," thought {hero}, and {he} put the pieces {hiding}.

        - "Have you seen my {thing}?" asked {friend}. "No," said {hero} and looked at the floor.
          "Where is the {noun}?" asked {friend}. "I do not know," {hero} said in a small voice.
          Soon {friend} came in. "Who took the {noun}?" {she} asked. "Maybe the wind," said {hero}.
          {friend} saw the empty place. "Did you do that, {hero}?" "No, not me," {he} said.
        - But the lie was as heavy as a stone.
          But the lie [burned|stung|itched], and {hero} could not sit still.
          {hero} wanted to smile, but {he} could not.
          {hero} could not play any more. {He} thought only of the {noun}.
        - At last {he} took the pieces to {friend}. "I broke it," {hero} said. "I am sorry."
          "I did it," {he} told {friend}. "I broke the {noun}, and I hid it {hiding}."

        - "I am sad about the {noun}," said {friend}, "but I am glad that you told me."
          {friend} put {hers} arms around {him}. "Thank you for the truth," {she} said.
        - They glued the pieces together, one by one.
          {close}, they glued the {noun} together. It had a few cracks, but it was still pretty.
          The next day, they went to the market, and {hero} helped to choose a new {noun}.
        - {hero} felt as light as a feather.
          After that, {hero} played with the {toy} only outside.
          {changed}
    """)


def cloud(t: Teller) -> None:
    """A small cloud cannot make enough rain, drinks from the sea, and comes back big."""
    kind = cast_hero(t, CLOUDS)
    cast_friend(t, kind)
    dry, plants = t.pick(words.DRY)
    t.know(dry=dry, plants=plants, water=words.WATERS, his_friend="{a_friend_kind} named {friend}")
    open_story(t, kind, words.EAGER)
    t.tell("""

        - One hot summer, it did not rain for [three|four|five|six] weeks.
          That summer was very hot and dry.
        - {hero} looked down and saw {his_friend} in a dry {dry}.
          Down below, {his_friend} stood in {a_dry}. The ground was hard and full of cracks.
        - "Please, cloud," {she} called, "{plants} are so thirsty!"
          "Can you help me, little cloud?" asked {friend}. "Without rain, {plants} will die."
        ? "I will try," said {hero}.
          "But I am so small," said {hero}. "Please try," said {friend}.
        - {hero} pressed and squeezed, but only three drops fell on the {dry}.
          One drop fell, then another. Then {hero} was empty.

        - "That is not enough," {hero} said sadly. "Wait for me, {friend}! I will be back."
          "Where can I find more water?" asked {hero}. "In {water}," said {friend}.
        - {hero} asked the wind for help, and the wind carried {him} to {water}.
          The little cloud flew all day and all night until it came to {water}.
        - There {hero} drank and drank and grew bigger and darker.
          {hero} drank for a whole day and became as big as a mountain.
        - Then {hero} flew back to the {dry}. "Are you ready?" {he} called. "Yes!" shouted {friend}.
          When {hero} came back, the sky over the {dry} grew dark. {friend} looked up and smiled.
        - And it rained and rained!
          A soft, warm rain came down.
          Boom! The rain poured down.

        - {friend} danced in the rain, and {plants} lifted their heads.
          Soon {plants} were fresh and green again, and {friend} laughed for joy.
        ? "Thank you, {hero}!" {she} called.
          A rainbow stood over the {dry}.
        ? Then {hero} was small again, but {he} did not mind.
        - {changed}
    """)


PLOTS: dict[str, Callable[[Teller], None]] = {
    plot.__name__: plot
    for plot in (
        lost,
        stuck,
        gift,
        quarrel,
        noise,
        lesson,
        race,
        foundling,
        greedy,
        repair,
        garden,
        honest,
        cloud,
    )
}
