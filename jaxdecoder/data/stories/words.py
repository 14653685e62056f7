"""The words of the story generator: who lives in the stories, where, and what happens to them.

Every string here is a template in the notation that `jaxdecoder.data.stories` explains. `{he}`,
`{him}`, `{his}` and `{himself}` are the hero's pronouns. `{she}`, `{her}` and `{hers}` ("her bag")
are the friend's. `[a|b]` is a choice.
"""

from dataclasses import dataclass

# --- Who ---------------------------------------------------------------------------------------

PRONOUNS = {
    "he": ("he", "him", "his", "himself"),
    "she": ("she", "her", "her", "herself"),
    "it": ("it", "it", "its", "itself"),
}


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = names(
    """
    Mia Anna Lucy Nora Ella Rosa Ivy Clara Tess Ruby Maya Lena Zoe Amy Hanna Sara Lily Emma
    Jane Molly Poppy Alma Greta Kate June Vera Sofia Dina Nell Kira
    """
)
BOYS = names(
    """
    Leo Tom Ben Max Finn Omar Jack Noah Theo Sam Hugo Luca Eli Oscar Tim Adam Felix Paul
    Henry Nico Ravi Kai Emil Peter Milo Ned Jonas Ali Simon Toby
    """
)
ANIMALS_SHE = names(
    """
    Hazel Clover Nutmeg Daisy Willow Fern Olive Honey Maple Plum Bella Penny Tansy Minnie
    Juniper Pearl Dot Mimi Lark Rosie
    """
)
ANIMALS_HE = names(
    """
    Pip Bramble Otto Rusty Barley Moss Chester Bruno Gus Pepper Basil Rocky Bobo Hector
    Biscuit Oakley Monty Fudge Tuck Percy
    """
)
ROBOTS = names(
    """
    Beep Bolt Zip Clank Tick Dash Pixel Gizmo Widget Sprocket Rivet Cog
    """
)
CLOUDS = names(
    """
    Puff Wisp Misty Fluff Drift Nimbus Drizzle Cotton
    """
)


@dataclass(frozen=True)
class Kind:
    """A sort of creature, the homes that suit it, and what it does without being taught."""

    noun: str
    adjectives: tuple[str, ...]
    homes: tuple[str, ...]
    skills: tuple[str, ...] = ()
    hand: str = "hand"
    hands: str = "hands"


CHILD_HOMES = (
    "in a small house by the sea",
    "in a yellow house at the end of the road",
    "in a little village between two hills",
    "in a tall house in the middle of the city",
    "on an old farm near the river",
    "in a cottage at the edge of the woods",
    "in a red house with a round window",
    "on a quiet street near the park",
    "in a flat above the bakery",
    "in a white house on top of a hill",
)
DEN = (
    "in a cozy den under the hill",
    "in a warm den by the stream",
    "in a den at the edge of the woods",
)
BURROW = (
    "in a snug burrow under an oak",
    "in a deep burrow in the meadow",
    "in a burrow below the hedge",
)
TREE = ("in a hollow tree in the woods", "in a tall pine by the lake", "in an old oak on the hill")
POND = (
    "in the reeds by the pond",
    "in a little house beside the lake",
    "at a quiet bend of the river",
)
FARM = (
    "in a big red barn",
    "on a farm at the foot of the hill",
    "in a green field behind the mill",
)
BASKET = (
    "in a soft basket by the stove",
    "in a house with a green door",
    "in a cottage near the mill",
)
WORKSHOP = (
    "in a workshop full of tools",
    "in a garage at the end of the road",
    "in a toy shop on a busy street",
    "in a bright room at the top of the house",
)

CHILD_ADJECTIVES = ("little", "young", "small")
GIRL = Kind("girl", CHILD_ADJECTIVES, CHILD_HOMES)
BOY = Kind("boy", CHILD_ADJECTIVES, CHILD_HOMES)
ROBOT = Kind("robot", ("little", "small", "shiny", "round", "silver"), WORKSHOP)
ANIMALS = (
    Kind("fox", ("little", "young", "red"), DEN, (), "paw", "paws"),
    Kind("rabbit", ("little", "small", "white", "gray"), BURROW, (), "paw", "paws"),
    Kind("bear", ("young", "little", "brown"), DEN, (), "paw", "paws"),
    Kind("mouse", ("tiny", "little", "gray"), BURROW, (), "paw", "paws"),
    Kind("squirrel", ("little", "red", "small"), TREE, ("climb",), "paw", "paws"),
    Kind("hedgehog", ("little", "small", "round"), BURROW, (), "paw", "paws"),
    Kind("badger", ("young", "little"), BURROW, (), "paw", "paws"),
    Kind("raccoon", ("young", "little"), TREE, ("climb",), "paw", "paws"),
    Kind("duck", ("little", "yellow", "young"), POND, ("swim",), "wing", "wings"),
    Kind("frog", ("little", "green", "small"), POND, ("swim",), "paw", "paws"),
    Kind("otter", ("young", "little", "brown"), POND, ("swim",), "paw", "paws"),
    Kind("turtle", ("small", "young", "green"), POND, ("swim",), "paw", "paws"),
    Kind("pig", ("little", "pink", "round"), FARM, (), "hoof", "hooves"),
    Kind("lamb", ("little", "white", "young"), FARM, (), "hoof", "hooves"),
    Kind("goat", ("young", "little", "white"), FARM, (), "hoof", "hooves"),
    Kind("pony", ("young", "brown", "little"), FARM, (), "hoof", "hooves"),
    Kind("puppy", ("little", "brown", "small"), BASKET, ("swim",), "paw", "paws"),
    Kind("kitten", ("little", "gray", "small"), BASKET, ("climb",), "paw", "paws"),
)

# Grown-ups who can help, as (what they are called, how they come into the story).
ELDERS = {
    "she": (("Mom", "{his} mom"), ("Grandma", "{his} grandma"), ("Aunt May", "{his} aunt May")),
    "he": (("Dad", "{his} dad"), ("Grandpa", "{his} grandpa"), ("Uncle Joe", "{his} uncle Joe")),
}


@dataclass(frozen=True)
class Trait:
    """What the hero is like: shown at the beginning, the cause of trouble, changed at the end."""

    adjective: str
    shown: tuple[str, ...]
    changed: tuple[str, ...]
    slips: tuple[str, ...] = ("",)


FORGETFUL = Trait(
    "forgetful",
    (
        "{He} was kind and clever, but {he} forgot things all the time.",
        "{hero} was so forgetful that {he} sometimes went back home three times in one morning.",
        "Everyone liked {hero}, but everyone knew that {he} forgot almost everything.",
    ),
    (
        "After that day, {hero} always looked around twice before going home.",
        "{hero} still forgot some things, but never {his} {thing}.",
        'From then on, {hero} stopped at every gate and asked {himself}, "Do I have everything?"',
    ),
    (
        "{hero} thought of this and that, but not of the {noun}.",
        "Soon {his} head was full of other things.",
    ),
)
CARELESS = Trait(
    "careless",
    (
        "{hero} was a bit careless and dropped things wherever {he} stood.",
        "{He} never put anything back where it belonged.",
        "{hero} liked to run about, and {he} did not take good care of {his} things.",
    ),
    (
        "From that day on, {hero} took good care of {his} things.",
        "{hero} was never so careless again.",
        "After that, {hero} put every toy back where it belonged.",
    ),
    (
        "{hero} did not look where {he} left it.",
        "The {noun} lay somewhere, and {hero} did not care where.",
    ),
)
IMPATIENT = Trait(
    "impatient",
    (
        "{hero} hated to wait.",
        "{He} wanted everything to happen right now.",
        "For {hero}, even one minute was much too long.",
        "{hero} was always in a hurry.",
        "{hero} ran where others walked and never sat still.",
        '"Is it ready yet?" {he} asked all day long.',
    ),
    (
        "After that, {hero} knew how to wait.",
        "{hero} was not in such a hurry any more.",
        '"Good things take time," {hero} said from then on.',
        "From that day on, {hero} thought first and acted later.",
        "And whenever {hero} wanted to rush, {he} took a deep breath and counted to ten.",
    ),
    (
        "{hero} did not stop to think.",
        "There was no time to lose, thought {hero}.",
        '"It has to be done now," {he} said.',
    ),
)
STUBBORN = Trait(
    "stubborn",
    (
        "{hero} never liked to ask for help.",
        "{He} wanted to do everything all by {himself}.",
        '"I can do it alone," {he} always said.',
    ),
    (
        "From then on, {hero} was not too proud to ask for help.",
        "{hero} had learned that asking for help is not hard at all.",
        "After that, when something was too hard, {hero} simply asked a friend.",
    ),
    (
        "{hero} did not call anyone.",
        '"I need no help," {he} [said|muttered].',
        "Asking somebody was out of the question.",
    ),
)
SHY = Trait(
    "shy",
    (
        "{hero} was so shy that {he} spoke only in a whisper.",
        "{He} was very shy and hid whenever guests came.",
        "When others talked to {him}, {hero} looked at the ground.",
    ),
    (
        "{hero} was still a little shy, but now {he} knew that {he} could speak up.",
        "From that day on, {hero} did not hide any more.",
        "After that, {hero} was not so shy.",
    ),
)
TIMID = Trait(
    "timid",
    (
        "{hero} was afraid of many things.",
        "{He} jumped at every little sound.",
        "Even a shadow on the wall made {hero} shiver.",
    ),
    (
        "After that night, {hero} felt much braver.",
        "{hero} was not so afraid any more.",
        "From then on, {hero} knew that {he} could be afraid and brave at the same time.",
    ),
)
PROUD = Trait(
    "proud",
    (
        "{hero} was fast, and {he} told everyone about it.",
        '{He} liked to say, "I am the best!"',
        "{hero} loved to win and did not like to lose.",
    ),
    (
        "{hero} did not boast any more.",
        "From then on, {hero} cared more about {his} friends than about winning.",
        "After that day, {hero} never laughed at a slower runner again.",
    ),
)
GREEDY = Trait(
    "greedy",
    (
        "{hero} always wanted the biggest piece.",
        "{He} did not like to share.",
        "Whatever {hero} had, {he} wanted more of it.",
    ),
    (
        "From then on, {hero} always shared.",
        "{hero} was not greedy any more.",
        "After that day, {hero} gave the first piece to a friend and took the second.",
    ),
)
BOSSY = Trait(
    "bossy",
    (
        "{hero} always wanted to choose the game.",
        "{He} liked to tell everyone what to do.",
        '"My rules!" {he} said in every game.',
    ),
    (
        "After that, {hero} asked others what they wanted to play.",
        "{hero} had learned to take turns.",
        "From then on, {hero} was not so bossy.",
    ),
)
CURIOUS = Trait(
    "curious",
    (
        "{hero} asked a hundred questions every day.",
        "{He} wanted to know how everything worked.",
        "{hero} looked into every box and behind every door.",
    ),
    (
        "{hero} stayed curious all {his} life, but {he} learned to ask first.",
        "And {hero} went on asking a hundred questions every day.",
        "From then on, {hero} was curious and careful.",
    ),
    (
        "{hero} wanted to look at everything at once.",
        "There was so much to see and so much to ask.",
    ),
)

# --- When --------------------------------------------------------------------------------------

SKIES = {
    "sunny": (
        "The sun was [warm|bright].",
        "There was not a cloud in the sky.",
        "Birds sang in [every tree|the hedges].",
        "Bees hummed [over the clover|in the warm air].",
    ),
    "windy": (
        "The wind [shook the leaves|whistled around the corners].",
        "The trees bent in the wind.",
        "Clouds raced by.",
        "Laundry flapped on every line.",
    ),
    "cloudy": (
        "Gray clouds hung over the hills.",
        "The air was cool and still.",
        "The sky was the color of [milk|pearls|stone].",
    ),
    "snowy": (
        "Snow lay on every roof.",
        "Snowflakes danced in the air.",
        "Icicles hung from the [eaves|gutters].",
        "It was very cold.",
    ),
    "rainy": (
        "Rain tapped on the windows.",
        "Big drops ran down the glass.",
        "Puddles grew in the street.",
    ),
}
CLOSES = {
    "morning": ("By noon", "At lunch time", "Before the morning was over"),
    "afternoon": ("That evening", "At supper time", "When the day was over", "Before it got dark"),
}

# --- Where -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A place where things get lost. What the hero did there tells where the thing is."""

    name: str
    doings: tuple[tuple[str, str, str], ...]  # ("fed the ducks", "feeding the ducks", spot)
    decoys: tuple[str, ...]


PLACES = (
    Place(
        "the park",
        (
            ("fed the ducks", "feeding the ducks", "beside the pond"),
            ("played on the swings", "playing on the swings", "under the swings"),
            ("watched the ants", "watching the ants", "in the grass by the ant hill"),
            ("went down the slide", "going down the slide", "at the bottom of the slide"),
        ),
        ("under the benches", "behind the fountain", "near the gate", "in the flower beds"),
    ),
    Place(
        "the beach",
        (
            ("built a sand castle", "building a sand castle", "behind the sand castle"),
            ("looked for shells", "looking for shells", "next to a heap of shells"),
            ("watched a crab", "watching a crab", "on the flat rock of the crab"),
        ),
        ("behind the dunes", "under the old boat", "in the seaweed", "on the stairs"),
    ),
    Place(
        "the woods",
        (
            ("picked berries", "picking berries", "under the berry bush"),
            ("climbed over logs", "climbing over logs", "behind a mossy log"),
            ("collected acorns", "collecting acorns", "between the roots of the oak"),
        ),
        ("among the ferns", "under the leaves", "behind the big stones", "along the path"),
    ),
    Place(
        "the meadow",
        (
            ("picked flowers", "picking flowers", "in the tall grass among the flowers"),
            ("chased butterflies", "chasing butterflies", "under a bush full of butterflies"),
            ("rolled down the slope", "rolling down the slope", "at the foot of the slope"),
        ),
        ("behind the fence", "by the stream", "under the apple tree", "near the gate"),
    ),
    Place(
        "the market",
        (
            ("tasted the cheese", "tasting the cheese", "beside the cheese stand"),
            ("looked at the fish", "looking at the fish", "behind a barrel of fish"),
            ("smelled the roses", "smelling the roses", "among the pots of roses"),
        ),
        ("under the carts", "between the apple boxes", "near the well", "on the steps"),
    ),
)

# --- What --------------------------------------------------------------------------------------

COLORS = (
    *("red", "blue", "green", "yellow", "purple", "orange", "white", "pink"),
    *("brown", "black", "golden", "silver", "striped", "shiny", "new", "old"),
)

# Dear things that can be carried about and lost, as (noun, why it is dear).
TREASURES = (
    ("ball", "It bounced higher than any other ball."),
    ("hat", "It kept {his} ears warm."),
    ("drum", "It went boom, boom, boom all day long."),
    ("book", "It was full of stories about pirates."),
    ("scarf", "It was as soft as a cloud."),
    ("whistle", "It could be heard from far away."),
    ("blanket", "It smelled like home."),
    ("toy car", "It rolled faster than the wind."),
    ("toy bear", "It had button eyes and a soft belly."),
    ("bag", "It had a pocket for every little thing."),
    ("flute", "It sang like a bird."),
    ("umbrella", "It had a handle like the head of a swan."),
    ("compass", "It always knew the way north."),
    ("yo-yo", "It hummed when it spun."),
    ("feather", "It came from the tail of a peacock."),
    ("spinning top", "It could dance on one foot."),
    ("marble", "It shone like a small planet."),
    ("ring", "It was a gift from far away."),
)


@dataclass(frozen=True)
class Mishap:
    """A toy, a way in which it gets stuck, and the tool that helps."""

    noun: str
    weather: str
    to: str  # "the hill"
    at: str  # "on the hill"
    play: str  # what the hero likes to do with it
    stuck: str  # what happens
    where: str  # where it then is
    why: str  # why the hero cannot simply take it
    tries: tuple[str, ...]
    tool: str
    rescue: str
    skill: str = ""  # a friend with this skill needs no tool
    skilled: str = ""


TREE_TRIES = (
    "{hero} jumped as high as {he} could, but the branch was far above {him}.",
    "{hero} shook the tree. Some leaves came down, but the {noun} did not.",
    "{hero} threw a stick at the {noun}, but the stick got stuck too.",
)
MISHAPS = (
    Mishap(
        "kite",
        "windy",
        "the hill",
        "on the hill",
        "fly {his} kite",
        "The wind pulled the string out of {his} {hand}, and the kite sailed into a tall tree",
        "in the tree",
        "It is too high.",
        TREE_TRIES,
        "a long ladder",
        "{friend} held the ladder, and {hero} climbed up, step by step, and pulled the kite free",
        "climb",
        "{friend} ran up the trunk, jumped from branch to branch, and set the kite free",
    ),
    Mishap(
        "balloon",
        "windy",
        "the garden",
        "in the garden",
        "run with {his} balloon",
        "The string slipped away, and the balloon floated up into the apple tree",
        "in the apple tree",
        "It is too high.",
        TREE_TRIES[:2],
        "a long pole with a hook",
        "{friend} lifted the pole, caught the string with the hook, and pulled the balloon down",
        "climb",
        "{friend} climbed up the tree, took the string, and came down with the balloon",
    ),
    Mishap(
        "boat",
        "sunny",
        "the pond",
        "on the pond",
        "sail {his} boat",
        "A little wave carried the boat away, and it got stuck in the reeds",
        "in the reeds",
        "It is too far from the shore.",
        (
            "{hero} threw pebbles to make waves, but the boat only went deeper into the reeds.",
            "{hero} stretched out {his} arm, but the boat was far out of reach.",
            "{hero} blew as hard as {he} could, but the boat did not move.",
        ),
        "a long net",
        "{friend} reached out with the net, and they pulled the boat back to the shore",
        "swim",
        "{friend} slid into the water, swam to the reeds, and pushed the boat back to the shore",
    ),
    Mishap(
        "ball",
        "sunny",
        "the yard",
        "in the yard",
        "kick {his} ball",
        "The ball flew up in the air and landed on the roof of the shed",
        "on the roof",
        "It is too high.",
        (
            "{hero} jumped up and down, but the roof was much too high.",
            "{hero} climbed onto a bucket, but the bucket tipped over and {he} fell.",
            "{hero} threw a shoe at the ball. Now the shoe was on the roof too.",
        ),
        "a ladder",
        "{friend} put the ladder against the wall, climbed up, and rolled the ball down",
        "climb",
        "{friend} climbed up the wall in no time and rolled the ball down",
    ),
    Mishap(
        "ball",
        "cloudy",
        "the field",
        "on the field",
        "roll {his} ball",
        "The ball rolled down the slope and disappeared under a bush full of thorns",
        "under the bush",
        "The thorns are too sharp.",
        (
            "{hero} reached under the bush, but a thorn pricked {him}.",
            "{hero} kicked the bush, but the ball stayed where it was.",
        ),
        "a garden rake",
        "{friend} pushed the rake under the bush and pulled the ball out",
    ),
    Mishap(
        "bucket",
        "sunny",
        "the old well",
        "near the old well",
        "carry water in {his} bucket",
        "The knot came loose, and the bucket fell into the well with a splash",
        "in the well",
        "It is too dark and deep.",
        (
            "{hero} leaned over the edge, but {he} could not even see the bottom.",
            "{hero} let down a ribbon, but the ribbon was too short.",
        ),
        "a rope with a hook",
        "{friend} let down the rope, and together they pulled the bucket out of the well",
    ),
    Mishap(
        "sled",
        "snowy",
        "the hill",
        "on the hill",
        "ride {his} sled",
        "The sled slid down the hill without {him} and sank into a deep pile of snow",
        "in the snow",
        "The snow is too deep.",
        (
            "{hero} pulled at the sled, but it did not move at all.",
            "{hero} dug with both {hands} until they were cold, but there was too much snow.",
        ),
        "a shovel",
        "{friend} dug the snow away with the shovel, and soon the sled was free",
    ),
    Mishap(
        "paper plane",
        "rainy",
        "the kitchen",
        "in the kitchen",
        "fly {his} paper plane",
        "The plane made a loop and landed on top of the tall cupboard",
        "on the cupboard",
        "It is too high.",
        (
            "{hero} climbed onto a chair, but {his} arms were too short.",
            "{hero} threw a sock at the plane, but the sock stayed up there too.",
        ),
        "a broom",
        "{friend} lifted the broom and gently swept the plane down",
        "climb",
        "{friend} climbed up the side of the cupboard and pushed the plane down",
    ),
)


@dataclass(frozen=True)
class Craft:
    """Something to make for someone, how haste spoils it, and how help saves it."""

    craft: str
    gift: str
    make: str
    gather: str
    slip: str
    spoiled: str
    advice: str
    again: str
    result: str


CRAFTS = (
    Craft(
        "a cake",
        "cake",
        "bake",
        "flour, eggs, and sugar",
        "{hero} opened the oven again and again to look",
        "the cake sank and was flat as a plate",
        "A cake needs time. Keep the oven shut until the bell rings",
        "they set the bell and waited",
        "the cake was tall and golden",
    ),
    Craft(
        "some cookies",
        "cookies",
        "bake",
        "butter, flour, and sugar",
        "{hero} made the fire much too hot",
        "the cookies burned until they were black",
        "A small fire is enough. Then we must watch the cookies",
        "they sat in front of the oven and watched",
        "the cookies were brown and sweet",
    ),
    Craft(
        "a pot of soup",
        "soup",
        "cook",
        "carrots, onions, and beans",
        "{hero} threw in the salt without looking",
        "the soup was so salty that nobody could eat it",
        "First a little salt, then a taste, then a little more",
        "they tasted after every pinch",
        "the soup was just right",
    ),
    Craft(
        "a loaf of bread",
        "bread",
        "bake",
        "flour, water, and a little salt",
        "{hero} did not let the dough rest",
        "the bread was as hard as a stone",
        "The dough has to sleep under a cloth until it is big and round",
        "they covered the dough and told each other stories",
        "the bread was soft and warm",
    ),
    Craft(
        "a card",
        "card",
        "make",
        "paper, paint, and glue",
        "{hero} folded the card before the paint was dry",
        "all the colors ran together, and the card was one big gray spot",
        "Paint first, then wait, then fold",
        "they put the new card in the sun until it was dry",
        "the colors were clear and bright",
    ),
    Craft(
        "a bird house",
        "bird house",
        "build",
        "boards, nails, and a hammer",
        "{hero} cut the boards without measuring them",
        "the roof was too small, and the walls fell down",
        "Measure twice and cut once",
        "they drew a line on every board before they cut it",
        "the bird house stood straight and strong",
    ),
    Craft(
        "a scarf",
        "scarf",
        "knit",
        "two needles and a basket of wool",
        "{hero} went so fast that {he} lost count",
        "the scarf was full of holes",
        "Go slowly and count every stitch",
        "they counted out loud, row after row",
        "the scarf was long and warm",
    ),
    Craft(
        "a lantern",
        "lantern",
        "make",
        "paper, string, and thin sticks",
        "{hero} pulled the string much too hard",
        "the sticks broke, and the paper was torn",
        "Pull gently and tie a small knot",
        "they tied one knot after another with great care",
        "the lantern was round and light",
    ),
)
# Why somebody gets a present, and what one says with it.
OCCASIONS = (
    ("It was {other}'s birthday", "Happy birthday"),
    ("{other} was sick in bed", "Get well soon"),
    ("{other} was new in school and had no friends yet", "Welcome"),
    ("{other} had been very kind to {him} all week", "This is for you"),
    ("{other} had looked sad for days", "This will cheer you up"),
    ("{other} had won a prize at school", "Well done"),
    ("{other} had come back from a long trip", "Welcome home"),
)


@dataclass(frozen=True)
class Lesson:
    """Something to learn, how it fails, the advice that helps, and how it works."""

    verb: str
    to: str
    weather: str
    fails: str
    advice: str
    works: str
    skill: str = ""


LESSONS = (
    Lesson(
        "swim",
        "the lake",
        "sunny",
        "{he} kicked and splashed, but {he} sank like a stone",
        "Lie on your back and breathe. The water will carry you",
        "the water carried {him}, and {he} moved forward, stroke by stroke",
        "swim",
    ),
    Lesson(
        "skate",
        "the frozen pond",
        "snowy",
        "{he} took one step on the ice and sat down hard",
        "Bend your knees and look ahead, not at the ice",
        "{he} glided over the ice without a wobble",
    ),
    Lesson(
        "whistle",
        "the garden",
        "cloudy",
        "{he} blew and blew, but only air came out",
        "Make a tiny round hole and blow softly",
        "a thin, clear sound came out and flew over the fence",
    ),
    Lesson(
        "juggle",
        "the square",
        "sunny",
        "{he} threw three apples in the air, and all three hit the ground",
        "Begin with one apple, then take two, and only then three",
        "the three apples flew in a circle, and not one of them fell",
    ),
    Lesson(
        "ride a bike",
        "the park",
        "sunny",
        "{he} wobbled to the left, wobbled to the right, and fell into the grass",
        "Look at the tree at the end of the path and keep going",
        "the wheels rolled straight, all the way to the tree",
    ),
    Lesson(
        "climb a rope",
        "the barn",
        "rainy",
        "{he} pulled {himself} up a little and slid right back down",
        "Hold the rope with your feet and rest after every pull",
        "{he} went up and up until {he} touched the roof beam",
        "climb",
    ),
    Lesson(
        "dance",
        "the hall",
        "rainy",
        "{he} turned left instead of right and bumped into the wall",
        "Listen to the drum and count to four",
        "{he} turned and hopped in time with the drum",
    ),
    Lesson(
        "sail",
        "the bay",
        "windy",
        "{he} pulled the wrong rope, and the little boat went around in circles",
        "Feel the wind on your face, then turn the sail to catch it",
        "the sail filled with wind, and the boat flew over the waves",
    ),
)


@dataclass(frozen=True)
class Contest:
    """A contest, how pride leads to a fall in it, and how a rival can help."""

    name: str
    weather: str
    ahead: str
    fall: str
    trouble: str
    help: str
    goal: str


CONTESTS = (
    Contest(
        "the race around the lake",
        "sunny",
        "ran far ahead",
        "tripped over a root",
        "my foot hurts, and I cannot stand",
        "{friend} put {his} arm around {hers} neck and helped {him} to walk",
        "the old bridge",
    ),
    Contest(
        "the sled race",
        "snowy",
        "flew down the hill",
        "drove into a deep pile of snow",
        "my sled is stuck",
        "{friend} dug the sled out of the snow and tied it to {hers} own",
        "the big snowman",
    ),
    Contest(
        "the boat race",
        "windy",
        "sailed far ahead",
        "ran onto a bank of sand",
        "my boat cannot move",
        "{friend} threw {him} a rope and pulled the boat off the sand",
        "the light house",
    ),
    Contest(
        "the wagon race",
        "cloudy",
        "rolled far ahead",
        "lost a wheel in a hole",
        "my wagon has only three wheels",
        "{friend} made room for {him} in {hers} own wagon",
        "the village gate",
    ),
)
PRIZES = ("a silver cup", "a cherry pie", "a blue ribbon", "a golden star", "a basket of plums")


@dataclass(frozen=True)
class Toy:
    """A toy for two, how it breaks when both pull, and how it is mended."""

    noun: str
    play: str
    breaks: str
    mend: str


TOYS = (
    Toy("kite", "fly it", "the paper tore in two", "closed the tear with paper and glue"),
    Toy("wagon", "ride in it", "the handle broke off", "put the handle back with two nails"),
    Toy("drum", "play it", "the skin of the drum burst", "made a new skin from an old bag"),
    Toy("book", "read it", "a page came out", "put the page back with tape"),
    Toy("jump rope", "jump", "the rope snapped", "tied the ends with a strong knot"),
    Toy("puppet", "hold it", "an arm came off", "sewed the arm on with needle and thread"),
    Toy("train", "drive it", "the last car fell off", "hung the car back on with a wire hook"),
    Toy("puzzle", "open it", "the pieces flew all over", "picked up all the pieces"),
)


@dataclass(frozen=True)
class Noise:
    """A sound in the dark, what it seems to be, and what it is."""

    to: str
    sound: str
    monster: str
    truth: str


NOISES = (
    Noise("the attic", "a scratching sound", "a monster with claws", "a kitten in a box"),
    Noise("the cellar", "a slow drip, drip, drip", "a giant", "water from a leaky pipe"),
    Noise("the barn", "a long, low moan", "a ghost", "the wind in the broken door"),
    Noise("the woods", "a deep hoot", "a witch", "an owl on a branch"),
    Noise("the shed", "a loud rattle", "a dragon in chains", "a mouse in a tin can"),
    Noise("the mill", "a creak and a thump", "a troll", "an old wheel in the stream"),
    Noise("the cave", "a strange voice", "a hungry wolf", "an echo"),
    Noise("the kitchen", "a soft hiss", "a huge snake", "the kettle on the stove"),
    Noise("the garden", "a rustle and a snort", "a wild beast", "a hedgehog in the leaves"),
)
ERRANDS = ("basket", "blue blanket", "honey jar", "warm coat", "old map", "big spoon", "red scarf")
LIGHTS = ("a lantern", "a candle", "a lamp")


@dataclass(frozen=True)
class Foundling:
    """A small animal in need, what it will not eat, what it will, and where it belongs."""

    noun: str
    state: str
    wrong: str
    right: str
    to: str


FOUNDLINGS = (
    Foundling("kitten", "cold and wet", "a leaf of lettuce", "a bowl of milk", "the barn"),
    Foundling("duckling", "all alone", "a piece of cheese", "some soft oats", "the pond"),
    Foundling("baby bird", "shivering", "a slice of cake", "a few small worms", "the nest"),
    Foundling("baby rabbit", "weak and thin", "a bit of fish", "a sweet carrot", "the burrow"),
    Foundling("baby squirrel", "very hungry", "a cup of soup", "some nuts", "the oak tree"),
    Foundling("lamb", "tired and lost", "an old bone", "a bottle of milk", "the green field"),
    Foundling("puppy", "muddy and sad", "a sour lemon", "a bit of meat", "the farm"),
    Foundling("foal", "limping", "a fried egg", "an apple", "the stable"),
)
HIDEOUTS = ("under a bush", "behind a fence", "in a ditch", "under the stairs", "in an empty box")


@dataclass(frozen=True)
class Repair:
    """A broken thing: how it fails, a foolish repair and its result, and the right repair."""

    noun: str
    use: str
    breaks: str
    fool: str
    worse: str
    tool: str
    mend: str


REPAIRS = (
    Repair(
        "lamp",
        "lit up the whole room",
        "flickered and went out",
        "shook the lamp",
        "the room stayed dark",
        "a new bulb",
        "turned the new bulb into its place",
    ),
    Repair(
        "clock",
        "told everyone when to get up",
        "stopped at half past six",
        "hit the clock with a spoon",
        "one of the hands fell off",
        "a tiny key",
        "wound the spring with the tiny key",
    ),
    Repair(
        "wagon",
        "carried wood from the forest",
        "lost a wheel with a loud crack",
        "tied the wheel on with grass",
        "the grass tore at the first stone",
        "a hammer and a peg",
        "fixed the wheel with the hammer and the peg",
    ),
    Repair(
        "music box",
        "played a sweet song at bedtime",
        "made a crunch and fell silent",
        "blew into the music box",
        "only some dust came out",
        "a drop of oil",
        "put the drop of oil on the little wheels",
    ),
    Repair(
        "swing",
        "went higher than the fence",
        "fell to the ground when a rope broke",
        "tied the ends with thin thread",
        "the thread snapped at once",
        "a strong rope",
        "tied the strong rope with a double knot",
    ),
    Repair(
        "tent",
        "kept out the wind and the rain",
        "tore from top to bottom",
        "closed the tear with honey",
        "only the ants were happy about it",
        "a needle and thread",
        "sewed up the tear with the needle and thread",
    ),
    Repair(
        "bell",
        "called everyone to supper",
        "fell silent because its clapper came off",
        "hit the bell with a carrot",
        "the carrot broke in two",
        "a strong hook",
        "hung the clapper back on the strong hook",
    ),
    Repair(
        "boat",
        "crossed the river every day",
        "began to leak",
        "pushed bread into the hole",
        "the fish ate the bread",
        "a bucket of tar",
        "closed the hole with wood and tar",
    ),
)


@dataclass(frozen=True)
class Treat:
    """Good things to eat, what they are carried in, and where they grow."""

    treats: str
    box: str
    source: str


TREATS = (
    Treat("berries", "basket", "in the woods"),
    Treat("apples", "sack", "in the orchard"),
    Treat("nuts", "bag", "under the old tree"),
    Treat("plums", "basket", "behind the mill"),
    Treat("pears", "cart", "on the farm"),
    Treat("cherries", "bucket", "on the hill"),
    Treat("grapes", "bowl", "along the wall"),
    Treat("tomatoes", "box", "in the garden"),
)

# Seeds, as (seed, what grows, what one does with it in the end).
SEEDS = (
    ("sunflower", "a sunflower as tall as a door", "They gave the seeds to the birds"),
    ("pumpkin", "a pumpkin as round as the moon", "They made a big pot of soup"),
    ("bean", "a bean plant as high as the window", "They picked a bowl of beans"),
    ("carrot", "a row of sweet carrots", "They pulled the carrots out, one by one"),
    ("strawberry", "a patch of red strawberries", "They ate strawberries all week"),
    ("melon", "a green melon with stripes", "They cut the melon into ten slices"),
    ("tulip", "a row of bright tulips", "They put one tulip on every table"),
    ("corn", "a stalk of corn with golden ears", "They roasted the corn over a fire"),
)

# Things that break indoors, as (noun, where it stands, toy, what the toy did to it).
BREAKABLES = (
    ("vase", "on the table", "ball", "bounced off the wall and hit"),
    ("cup", "on the shelf", "hoop", "rolled across the room and knocked over"),
    ("mirror", "in the hall", "ball", "flew through the air and hit"),
    ("bowl", "on the table", "hat", "sailed across the room and knocked over"),
    ("jar", "on the shelf", "rope", "swung around and caught"),
    ("teapot", "on the stove", "drum stick", "flew out of {his} {hand} and hit"),
    ("plate", "on the wall", "paddle", "slipped out of {his} {hand} and hit"),
)
HIDING_PLACES = ("under the rug", "behind the sofa", "in a drawer", "in an old boot")

# Where a garden is dry, as (what, what grows there).
DRY = (
    ("garden", "the roses"),
    ("field", "the sunflowers"),
    ("orchard", "the apple trees"),
    ("meadow", "the flowers"),
    ("vegetable patch", "the beans"),
    ("park", "the young trees"),
)
WATERS = ("the sea", "the wide river", "the deep lake")

EAGER = Trait(
    "eager",
    (
        "{hero} wanted to help, but the bigger clouds only laughed.",
        "{He} was the smallest cloud in the whole sky.",
        '"I am too small for anything," {hero} often said.',
    ),
    (
        "{hero} never felt too small again.",
        "And the bigger clouds did not laugh at {hero} any more.",
        "From that day on, {hero} was proud to be a cloud.",
    ),
)
CLOUD_HOMES = ("in the wide blue sky", "above the hills", "high over the sea")
CLOUD = Kind("cloud", ("little", "small", "white", "gray", "fluffy"), CLOUD_HOMES)

# --- In any plot ---------------------------------------------------------------------------------

# Passages by name, which an outline may give instead of its own wordings.
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
