"""Judge told stories by the grammar of the built-in ones (`jaxdecoder.data.stories`).

The grammar is learned by listening: `listen` lets it tell thousands of stories and notes every
wording of a sentence, every wording of a fact, where a person may enter and where a plot may end.
`Grammar.judge` then reads any text against these patterns.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import count, product
from typing import NamedTuple

from jaxdecoder.data.stories import EVERYTHING, Story, World, tell_story, upper_first

SLOT = re.compile(r"\{(\w+)\}")
NAME = r"(?!(?:He|She|It) )[A-Z][a-z]+(?: [A-Z][a-z]+)?"
SPELLED = re.compile(r"[.!?]|^\{(hero|friend)\}")
"""In the wording of a fact: it has sentences of its own, or may begin one with a name."""
FORMS = {
    "he": {"he", "him", "his", "himself"},
    "she": {"she", "her", "hers", "herself"},
    "it": {"it", "its", "itself"},
}
OWNER = {**dict.fromkeys(FORMS["he"], "hero"), **dict.fromkeys(FORMS["she"], "friend")}
"""Whose each pronoun's slot is, see `jaxdecoder.data.stories`; what fills it is up to the story."""
ROLE = {"hero": "hero", "friend": "friend", "other": "other", "relative": "friend"}
"""Whom a slot names."""
KIND = {"creature": "hero", "friend_kind": "friend"}
"""Of whom a slot says what they are."""


class Verdict(NamedTuple):
    """What there is to say of one story."""

    sentences: int
    well_formed: int
    """Sentences that the grammar could have said, their slots in agreement."""
    steady: bool
    """All keep their names, nobody is named who was not introduced, and every pronoun fits."""
    ended: bool
    """It stopped by itself, on a sentence that ends the plot most of its sentences belong to."""


class Person(NamedTuple):
    """Somebody in a story, as far as is known."""

    name: str = ""
    pronoun: str = ""
    kind: str = ""


Cast = dict[str, Person]
"""Who is who, by role."""


@dataclass
class Pattern:
    """One sentence of the grammar, with its facts left open."""

    template: str
    plots: set[str] = field(default_factory=set)
    ends: set[str] = field(default_factory=set)
    """The plots that may end with it."""
    enters: set[str] = field(default_factory=set)
    """The roles that may be named in it for the first time."""

    @cached_property
    def literal(self) -> str:
        """Text that every such sentence has."""
        return max(SLOT.split(self.template)[::2], key=len)


class Grammar:
    """What was heard of the grammar."""

    def __init__(self, stories: Iterable[Story]) -> None:
        self.facts: dict[str, dict[str, set[str]]] = defaultdict(dict)
        """Of every fact its wordings, and the plots in which it was heard in them."""
        self.pronouns: dict[str, set[str]] = defaultdict(set)
        """Of every name and every kind of creature."""
        self.kin: dict[str, set[str]] = defaultdict(set)
        """Of every such word those that go together: all names of girls, and "girl"."""
        self.relatives: dict[str, str] = {}
        self.capitals: set[str] = set()
        self.patterns: dict[str, Pattern] = {}
        wordings: dict[str, Pattern] = {}
        for story in stories:
            self._hear(story, wordings)
        for wording in wordings.values():
            self._divide(wording)

    def _hear(self, story: Story, wordings: dict[str, Pattern]) -> None:
        chosen: dict[str, set[str]] = {}
        met: set[str] = set()
        phrase = ""
        for name, pronoun in story.cast:
            self.pronouns[name].add(pronoun)
        for fact, phrase in story.phrases:
            if fact == "his_friend":
                self.facts[fact].setdefault("{friend}", set()).add(story.plot)
                if "{friend" not in phrase:  # "his grandma", who is called Grandma from then on
                    relative = phrase.removeprefix("{his} ")
                    self.relatives[relative] = story.facts["friend"]
                    self.facts["relative"].setdefault(relative, set()).add(story.plot)
                    phrase = "{his} {relative}"
            for slot, role in KIND.items():
                if f"{{{slot}}}" in phrase:
                    self._pair(story.facts[role], story.facts[slot])
            if fact:
                chosen[fact] = {phrase}
                if phrase:
                    self.facts[fact].setdefault(phrase, set()).add(story.plot)
                continue
            wording = wordings.setdefault(phrase, Pattern(phrase))
            wording.plots.add(story.plot)
            here = _roles(phrase, chosen)
            wording.enters |= here - met
            met |= here
        wordings[phrase].ends.add(story.plot)
        self.capitals.update(re.findall(r"[A-Z][a-z]*", story.text))

    def _pair(self, name: str, kind: str) -> None:
        """Notes that somebody of this name is one of this kind."""
        self.pronouns[kind] |= self.pronouns[name]
        if self.kin[name] is not self.kin[kind]:
            together = {name, kind} | self.kin[name] | self.kin[kind]
            self.kin |= dict.fromkeys(together, together)

    def _divide(self, wording: Pattern) -> None:
        """Divides a wording into the patterns of its sentences."""
        for text, plots in self._spelled_out(upper_slot(wording.template), wording.plots):
            for sentence in sentences_of(text, self._is_capital):
                pattern = self.patterns.setdefault(sentence, Pattern(sentence))
                pattern.plots |= plots
                pattern.enters |= self._entering(wording, sentence)
            pattern.ends |= wording.ends & plots

    def _entering(self, wording: Pattern, sentence: str) -> set[str]:
        """Who may be named for the first time in a sentence of a wording that is spelled out.

        Where the wording introduces a friend, a sentence with the bare name is of later on.
        """
        roles = wording.enters & _roles(sentence, self.facts)
        if "{his_friend}" not in wording.template.lower():
            return roles
        first = self.facts["his_friend"].keys() - {"{friend}"}
        introduces = any(form(text) in sentence for text in first for form in (str, upper_slot))
        return roles if introduces else roles - {"friend"}

    def _is_capital(self, slot: str) -> bool:
        """Whether what fills a slot begins with a capital."""
        begins = (SLOT.match(wording) or wording for wording in self.facts.get(slot, {"": set()}))
        return slot[0].isupper() or all(
            w[:1].isupper() if isinstance(w, str) else self._is_capital(w[1]) for w in begins
        )

    def _spelled_out(self, template: str, plots: set[str]) -> Iterator[tuple[str, set[str]]]:
        """The template with every fact that is about sentences written out, see `SPELLED`, and
        which of these plots may tell it so."""
        parts = SLOT.split(template)
        choices: list[list[tuple[str, set[str]]]] = []
        for i, part in enumerate(parts):
            name = part if part in self.facts else part[:1].lower() + part[1:]
            if i % 2 == 0:
                choices.append([(part, plots)])
            elif any(SPELLED.search(wording) for wording in self.facts.get(name, ())):
                upper = upper_slot if name != part or not "".join(parts[:i]) else str
                spelled = (
                    self._spelled_out(upper(wording), plots & heard)
                    for wording, heard in self.facts[name].items()
                )
                choices.append([choice for several in spelled for choice in several])
            else:
                choices.append([(f"{{{part}}}", plots)])
        for choice in product(*choices):
            if together := set.intersection(*(heard for _, heard in choice)):
                yield "".join(text for text, _ in choice), together

    @cached_property
    def _matchers(self) -> list[tuple[Pattern, re.Pattern[str]]]:
        return [(p, re.compile(self._sentence(p.template))) for p in self.patterns.values()]

    def _sentence(self, template: str) -> str:
        numbers = count()
        first = re.match(r"\{([Hh]ero|[Ff]riend|His_friend)\}(?= [a-z{])", template)
        whole = self._expression(template, numbers)
        if not first:
            return whole
        # The second of two sentences about the same person may begin with the pronoun.
        pronoun = "He" if first[1] in ("hero", "Hero") else "She"
        rest = template[first.end() :]
        return f"{whole}|{self._expression(f'{{{pronoun}}}{rest}', numbers)}"

    def _expression(self, template: str, numbers: Iterator[int]) -> str:
        """A regular expression in which each slot is a group, named after it and numbered."""
        parts = SLOT.split(template)
        for i in range(1, len(parts), 2):
            parts[i] = self._slot(parts[i], numbers)
        parts[::2] = map(re.escape, parts[::2])
        return "".join(parts)

    def _slot(self, slot: str, numbers: Iterator[int]) -> str:
        article = ""
        upper = slot[0].isupper()
        name = slot[0].lower() + slot[1:]
        if name not in self.facts and name.startswith("a_"):
            article = "[Aa]" if upper else "a"
            article = f"(?:{article}n (?=[aeiou])|{article} (?![aeiou]))"
            name, upper = name.removeprefix("a_"), False
        if name in ("hero", "friend", "other"):
            inner = NAME
        else:
            form = upper_slot if upper else str
            wordings = sorted({form(wording) for wording in self.facts[name]})
            inner = "|".join(self._expression(wording, numbers) for wording in wordings)
        return f"{article}(?P<{name}__{next(numbers)}>{inner})"

    def readings(self, sentence: str) -> list[tuple[Pattern, Cast]]:
        """Every way in which the grammar could have said a sentence, and who is who in it."""
        return [
            (pattern, cast)
            for pattern, matcher in self._matchers
            if pattern.literal in sentence
            and (match := matcher.fullmatch(sentence))
            and (cast := self._cast(match)) is not None
        ]

    def _cast(self, match: re.Match[str]) -> Cast | None:
        """Who is who in a match; None if its slots do not agree with each other."""
        values: dict[str, set[str]] = defaultdict(set)
        for group, value in match.groupdict().items():
            if value is not None:
                slot = group.split("__")[0]
                named = value if slot in ROLE else value.lower()
                values[slot].add(self.relatives.get(named, named))
        cast: Cast = {}
        for slot, value in values.items():
            if len(value) > 1:
                return None
            if slot in ROLE:
                person = Person(name=next(iter(value)))
            elif slot in OWNER:
                (gender,) = (g for g, forms in FORMS.items() if value <= forms)
                person = Person(pronoun=gender)
            elif slot in KIND:
                person = Person(kind=next(iter(value)))
            else:
                continue
            role = ROLE.get(slot) or OWNER.get(slot) or KIND[slot]
            merged = self._merge(cast.get(role, Person()), person, role)
            if merged is None:
                return None
            cast[role] = merged
        return cast

    def _merge(self, a: Person, b: Person, role: str) -> Person | None:
        """Both in one, if they can be the same."""
        if any(x and y and x != y for x, y in zip(a, b, strict=True)):
            return None
        person = Person(*(x or y for x, y in zip(a, b, strict=True)))
        name, pronoun, kind = person
        if name and name not in self.facts[role]:
            return None
        if pronoun and any(pronoun not in self.pronouns[word] for word in (name, kind) if word):
            return None
        if name and kind and name not in self.kin[kind]:
            return None
        return person

    def judge(self, text: str, *, finished: bool = True) -> Verdict:
        """Judges a story; `finished` says whether it stopped by itself."""
        casts: list[Cast] = [{}]
        votes: Counter[str] = Counter()
        sentences = list(sentences_of(text))
        read: list[tuple[Pattern, Cast]] = []
        well_formed = 0
        for sentence in sentences:
            read = self.readings(sentence)
            well_formed += bool(read)
            votes.update({plot for pattern, _ in read for plot in pattern.plots})
            if read:
                joined = (self._join(cast, *reading) for cast in casts for reading in read)
                casts = [cast for cast in joined if cast is not None]
                casts = [cast for i, cast in enumerate(casts) if cast not in casts[:i]]
            else:
                casts = [cast for cast in casts if self._knows_all(cast, sentence)]
        most = max(votes.values(), default=0)
        plots = {plot for plot, number in votes.items() if number == most}
        ends = any(pattern.ends & plots for pattern, _ in read)
        return Verdict(len(sentences), well_formed, bool(casts), finished and ends)

    def _join(self, known: Cast, pattern: Pattern, seen: Cast) -> Cast | None:
        """What is known after a sentence; None if it contradicts what was known before."""
        joined = dict(known)
        for role, person in seen.items():
            before = known.get(role, Person())
            if person.name and not before.name and role not in pattern.enters:
                return None
            merged = self._merge(before, person, role)
            if merged is None:
                return None
            joined[role] = merged
        names = [person.name for person in joined.values() if person.name]
        return joined if len(set(names)) == len(names) else None

    def _knows_all(self, cast: Cast, sentence: str) -> bool:
        """Whether a sentence that is not the grammar's speaks of nobody else."""
        known = {word for person in cast.values() for word in person.name.split()}
        names = {word for role in ROLE for name in self.facts[role] for word in name.split()}
        capitals = set(re.findall(r"[A-Z][a-z]*", sentence))
        genders = {person.pronoun for person in cast.values()}
        genders |= {p for person in cast.values() for p in self.pronouns.get(person.name, ())}
        words = set(re.findall("[a-z]+", sentence.lower()))
        return (
            not (capitals & names) - known
            and capitals <= self.capitals
            and all(gender in genders for gender in ("he", "she") if words & FORMS[gender])
        )


@cache
def listen(world: World = EVERYTHING, stories: int = 20_000, seed: int = 0) -> Grammar:
    """The grammar of a world, learned from so many of its stories."""
    rng = random.Random(seed)
    return Grammar(tell_story(rng, world) for _ in range(stories))


def sentences_of(text: str, is_capital: Callable[[str], bool] = str.istitle) -> Iterator[str]:
    """The sentences of a text, or of a wording whose slots are still open.

    `is_capital` says of a slot whether it begins as a sentence does.
    """
    start = 0
    for match in re.finditer(r'\n|(?<=[.!?]) (?=["A-Z{])|(?<=[.!?]") (?=["A-Z{])', text):
        slot = SLOT.match(text, match.end())
        if slot and not is_capital(slot[1]):
            continue
        yield text[start : match.start()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def upper_slot(template: str) -> str:
    """The template as it begins a sentence."""
    return "{" + upper_first(template[1:]) if template.startswith("{") else upper_first(template)


def _roles(template: str, facts: Mapping[str, Collection[str]]) -> set[str]:
    """Who may be named in a template, or in the facts that it tells."""
    roles: set[str] = set()
    for slot in SLOT.findall(template):
        name = slot[0].lower() + slot[1:]
        if name in ROLE:
            roles.add(ROLE[name])
        else:
            for wording in facts.get(name, ()):
                roles |= _roles(wording, facts)
    return roles
