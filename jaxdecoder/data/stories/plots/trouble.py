"""Plots in which the hero has a problem, fails alone, and succeeds with a friend."""

from jaxdecoder.data.stories import words
from jaxdecoder.data.stories.casting import (
    BEASTS,
    CHILDREN,
    cast_friend,
    cast_hero,
    cast_other,
    know_thing,
    open_story,
    set_day,
)
from jaxdecoder.data.stories.telling import Teller


def lost(t: Teller) -> None:
    """The hero loses a dear thing, a friend asks where the hero was, and there it is."""
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
