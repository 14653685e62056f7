"""Choose the people of a story, and open it."""

from collections.abc import Sequence

from jaxdecoder.data.stories import words
from jaxdecoder.data.stories.telling import Teller
from jaxdecoder.data.stories.words import Kind, Trait

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
    """Choose the hero; never a creature with the skill `unlike`, which would have no trouble."""
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
    """Choose a friend: a peer, an elder or either, with another pronoun than the hero's."""
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
    """Choose somebody who is mentioned only by name."""
    lists = (words.ANIMALS_SHE, words.ANIMALS_HE)
    if hero not in words.ANIMALS:
        lists = (words.GIRLS, words.BOYS)
    given = [name for names in lists for name in t.given(names)]
    known = [name for name, _ in t.cast]
    t.know(other=t.pick([name for name in given if name not in known]))


def open_story(t: Teller, kind: Kind, trait: Trait) -> None:
    """Tell who the hero is, where the hero lives, and the trait that will matter."""
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
    """Choose one weather and one time of day for the whole story."""
    weather = t.pick(weathers or ("sunny", "windy", "cloudy"))
    time = t.pick(("morning", "afternoon"))
    t.know(when=f"one {weather} {time}", sky=words.SKIES[weather])
    t.know(weather=weather, time=time, close=words.CLOSES[time])


def know_thing(t: Teller, noun: str, adjectives: Sequence[str] = words.COLORS) -> None:
    """Fix the object of the story: `{noun}` is a kite, `{thing}` is a red kite."""
    t.note(color=t.pick(adjectives))
    t.know(noun=noun, thing="{color} {noun}")
