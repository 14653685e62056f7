"""Plots about being kind or unkind to others, and what follows from it."""

from jaxdecoder.data.stories import words
from jaxdecoder.data.stories.casting import (
    BEASTS,
    CHILDREN,
    CLOUDS,
    cast_friend,
    cast_hero,
    know_thing,
    open_story,
    set_day,
)
from jaxdecoder.data.stories.telling import Teller


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
    """The hero keeps too much food, which is too heavy or too sweet; shared, it is a feast."""
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
