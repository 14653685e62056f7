"""Tell a plot: read its outline, and make its sentences a story."""

import random
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeVar

from jaxdecoder.data.stories.words import COMMON
from jaxdecoder.data.stories.world import EVERYTHING, World

T = TypeVar("T")


class Facts(dict[str, str]):
    """The facts of one story. `{He}` is `{he}` at the beginning of a sentence, and `{a_kite}` is
    `{kite}` with its article."""

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
    """Read a script. "-" begins a beat, "?" begins a beat that may be left out, and a blank line
    begins a paragraph. Other lines are paraphrases of the beat, or the name of a list of them."""
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
    """Return all choices of a template: "a [big|huge] [tree|bush]" has four."""
    parts = re.split(r"\[([^\]]*)\]", template)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return tuple("".join(choice) for choice in product(*choices))


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def a(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


class Teller:
    """Collect the sentences of one story, and the facts that they must agree with."""

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
        """Return those of these names that exist in this world."""
        return names[: self.world.names or None]

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def fill(self, template: str, fact: str = "") -> str:
        phrase = self.pick(spell_out(template))
        self.phrases.append((fact, phrase))
        return phrase.format_map(self.facts)

    def know(self, **facts: str | tuple[str, ...]) -> None:
        """Fix facts for the rest of the story; of a tuple, choose one."""
        for name, fact in facts.items():
            self.facts[name] = self.fill(fact if isinstance(fact, str) else self.pick(fact), name)

    def note(self, **facts: str) -> None:
        """Fix facts that leave no choice."""
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
        """Return the story. A pronoun replaces a name that the sentence before begins with."""
        text = "\n".join(" ".join(sentences) for sentences in self.paragraphs)
        for name, pronoun in self.cast:
            if pronoun != "it":  # "it" could as well be the ball
                again = rf"\b({name}\b[^.!?\"\n]*[.!]) {name}(?= [a-z])"
                text = re.sub(again, rf"\1 {upper_first(pronoun)}", text)
        return text
