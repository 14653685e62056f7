"""The words of the story generator: who lives in the stories, where, and what befalls them.

Every string here is a template in the small notation that `stories.Teller` explains: `{he}`,
`{him}`, `{his}` and `{himself}` are the hero's pronouns, `{she}`, `{her}` and `{hers}` ("her bag")
the friend's, and `[a|b]` is a choice.
"""

from dataclasses import dataclass

# --- Who ---------------------------------------------------------------------------------------

PRONOUNS = {
    "he": ("he", "him", "his", "himself"),
    "she": ("she", "her", "her", "herself"),
    "it": ("it", "it", "its", "itself"),
}

GIRLS = [
    "Mia",
    "Anna",
    "Lucy",
    "Nora",
    "Ella",
    "Rosa",
    "Ivy",
    "Clara",
    "Tess",
    "Ruby",
    "Maya",
    "Lena",
    "Zoe",
    "Amy",
    "Hanna",
    "Sara",
    "Lily",
    "Emma",
    "Jane",
    "Molly",
    "Poppy",
    "Alma",
    "Greta",
    "Kate",
    "June",
    "Vera",
    "Sofia",
    "Dina",
    "Nell",
    "Kira",
]
BOYS = [
    "Leo",
    "Tom",
    "Ben",
    "Max",
    "Finn",
    "Omar",
    "Jack",
    "Noah",
    "Theo",
    "Sam",
    "Hugo",
    "Luca",
    "Eli",
    "Oscar",
    "Tim",
    "Adam",
    "Felix",
    "Paul",
    "Henry",
    "Nico",
    "Ravi",
    "Kai",
    "Emil",
    "Peter",
    "Milo",
    "Ned",
    "Jonas",
    "Ali",
    "Simon",
    "Toby",
]
ANIMALS_SHE = [
    "Hazel",
    "Clover",
    "Nutmeg",
    "Daisy",
    "Willow",
    "Fern",
    "Olive",
    "Honey",
    "Maple",
    "Plum",
    "Bella",
    "Penny",
    "Tansy",
    "Minnie",
    "Juniper",
    "Pearl",
    "Dot",
    "Mimi",
    "Lark",
    "Rosie",
]
ANIMALS_HE = [
    "Pip",
    "Bramble",
    "Otto",
    "Rusty",
    "Barley",
    "Moss",
    "Chester",
    "Bruno",
    "Gus",
    "Pepper",
    "Basil",
    "Rocky",
    "Bobo",
    "Hector",
    "Biscuit",
    "Oakley",
    "Monty",
    "Fudge",
    "Tuck",
    "Percy",
]
ROBOTS = [
    "Beep",
    "Bolt",
    "Zip",
    "Clank",
    "Tick",
    "Dash",
    "Pixel",
    "Gizmo",
    "Widget",
    "Sprocket",
    "Rivet",
    "Cog",
]
TOYS_SHE = ["Lulu", "Dolly", "Trixie", "Bonnie", "Coco", "Tilly"]
TOYS_HE = ["Jasper", "Corky", "Button", "Waldo", "Marvin", "Rufus"]
CLOUDS = ["Puff", "Wisp", "Misty", "Fluff", "Drift", "Nimbus", "Drizzle", "Cotton"]


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
    "a small house by the sea",
    "a yellow house at the end of the road",
    "a little village between two hills",
    "a tall house in the middle of the city",
    "an old farm near the river",
    "a cottage at the edge of the woods",
    "a red house with a round window",
    "a quiet street near the park",
    "a flat above the bakery",
    "a white house on top of a hill",
)
DEN = ("a cozy den under the hill", "a warm den by the stream", "a den at the edge of the woods")
BURROW = ("a snug burrow under an oak", "a deep burrow in the meadow", "a burrow below the hedge")
TREE = ("a hollow tree in the woods", "a tall pine by the lake", "an old oak on the hill")
POND = ("the reeds by the pond", "a little house beside the lake", "a quiet bend of the river")
FARM = ("a big red barn", "a farm at the foot of the hill", "a green field behind the mill")
BASKET = ("a soft basket by the stove", "a house with a green door", "a cottage near the mill")
WORKSHOP = (
    "a workshop full of tools",
    "a garage at the end of the road",
    "a toy shop on a busy street",
    "a bright room at the top of the house",
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
    """What the hero is like: shown at the beginning, and changed at the end."""

    adjective: str
    shown: tuple[str, ...]
    changed: tuple[str, ...]


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
)
IMPATIENT = Trait(
    "impatient",
    (
        "{hero} hated to wait.",
        "{He} wanted everything to happen right now.",
        "For {hero}, even one minute was much too long.",
        "{hero} was always in a hurry.",
    ),
    (
        "After that, {hero} knew how to wait.",
        "{hero} was not in such a hurry any more.",
        "And whenever {hero} wanted to rush, {he} took a deep breath and counted to ten.",
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
)

# --- When --------------------------------------------------------------------------------------

SKIES = {
    "sunny": ("The sun was [warm|bright].", "There was not a cloud in the sky.", "Birds sang."),
    "windy": ("The wind shook the leaves.", "The trees bent in the wind.", "Clouds raced by."),
    "cloudy": ("Gray clouds hung over the hills.", "The air was cool and still."),
    "snowy": ("Snow lay on every roof.", "Snowflakes danced in the air.", "It was very cold."),
    "rainy": ("Rain tapped on the windows.", "Big drops ran down the glass."),
}
CLOSES = {
    "morning": ("By noon", "At lunch time", "Before the morning was over"),
    "afternoon": ("That evening", "At supper time", "When the day was over", "Before it got dark"),
}

# --- Where -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A place to lose things in. What the hero was doing there tells where the thing is."""

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

COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "pink")

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
    ("bear", "It had button eyes and a soft belly."),
    ("bag", "It had a pocket for every little thing."),
    ("flute", "It sang like a bird."),
    ("umbrella", "It had a handle like the head of a duck."),
    ("ring", "It was a gift from far away."),
)


@dataclass(frozen=True)
class Mishap:
    """A toy gets stuck somewhere, in a way that suits the toy; a tool that suits the trouble."""

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
        "too high",
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
        "too high",
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
        "too far from the shore",
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
        "too high",
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
        "behind too many thorns",
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
        "too deep down",
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
        "too deep in the snow",
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
        "too high",
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

    noun: str
    verb: str
    gather: str
    slip: str
    spoiled: str
    advice: str
    again: str
    result: str


CRAFTS = (
    Craft(
        "a cake",
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
        "bake",
        "butter, flour, and sugar",
        "{hero} made the fire much too hot",
        "smoke filled the kitchen, and the cookies were black",
        "A small fire is enough. Then we must watch the cookies",
        "they sat in front of the oven and watched",
        "the cookies were brown and sweet",
    ),
    Craft(
        "a pot of soup",
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
        "make",
        "paper, string, and thin sticks",
        "{hero} pulled the string much too hard",
        "the sticks broke, and the paper was torn",
        "Pull gently and tie a small knot",
        "they tied one knot after another with great care",
        "the lantern was round and light",
    ),
)
EVENTS = (
    ("birthday", "It was almost {other}'s birthday", "Happy birthday"),
    ("sick", "{other} was sick in bed", "Get well soon"),
    ("new", "{other} had just moved to the village", "Welcome"),
    ("thanks", "{other} had been very kind to {him} all week", "Thank you for everything"),
)

# Things to learn, as (verb, past, place, weather, how it fails, advice, how it works, skill).
LESSONS = (
    (
        "swim",
        "swam",
        "the lake",
        "sunny",
        "{hero} kicked and splashed, but {he} sank like a stone",
        "Lie on your back and breathe. The water will carry you",
        "the water carried {him}, and {he} moved forward, stroke by stroke",
        "swim",
    ),
    (
        "skate",
        "skated",
        "the frozen pond",
        "snowy",
        "{hero} took one step on the ice and sat down hard",
        "Bend your knees and look ahead, not at the ice",
        "{he} glided over the ice without a wobble",
        "",
    ),
    (
        "whistle",
        "whistled",
        "the garden",
        "cloudy",
        "{hero} blew and blew, but only air came out",
        "Make a tiny round hole and blow softly",
        "a thin, clear sound came out and flew over the fence",
        "",
    ),
    (
        "juggle",
        "juggled",
        "the square",
        "sunny",
        "{hero} threw three apples in the air, and all three hit the ground",
        "Begin with one apple, then take two, and only then three",
        "the three apples flew in a circle and not one of them fell",
        "",
    ),
    (
        "ride a bike",
        "rode the bike",
        "the park",
        "sunny",
        "{hero} wobbled to the left, wobbled to the right, and fell into the grass",
        "Look at the tree at the end of the path and keep going",
        "the wheels rolled straight, all the way to the tree",
        "",
    ),
    (
        "climb a rope",
        "climbed the rope",
        "the barn",
        "rainy",
        "{hero} pulled {himself} up a little and slid right back down",
        "Hold the rope with your feet and rest after every pull",
        "{he} went up and up until {he} touched the roof beam",
        "climb",
    ),
    (
        "dance",
        "danced",
        "the barn",
        "rainy",
        "{hero} turned left when {he} should have turned right and bumped into the wall",
        "Listen to the drum and count to four",
        "{he} turned and hopped in time with the drum",
        "",
    ),
    (
        "sail",
        "sailed",
        "the bay",
        "windy",
        "{hero} pulled the wrong rope, and the little boat went around in circles",
        "Feel the wind on your face, then turn the sail to catch it",
        "the sail filled with wind and the boat flew over the waves",
        "",
    ),
)

# Frightening sounds, as (where, sound, what it seemed, what it was).
NOISES = (
    ("the attic", "a scratching sound", "a monster with claws", "a kitten in an old box"),
    ("the cellar", "a slow drip, drip, drip", "the steps of a giant", "water from a leaky pipe"),
    ("the barn", "a long, low moan", "a ghost", "the wind in the broken door"),
    ("the woods", "a deep hoot", "a witch", "a sleepy owl on a branch"),
    ("the shed", "a loud rattle", "a dragon in chains", "a mouse in a tin can"),
    ("the mill", "a creak and a thump", "a troll", "an old wheel turning in the stream"),
    ("the cave", "a strange voice", "a hungry wolf", "only an echo"),
)
# Things to fetch from such places.
ERRANDS = ("the basket", "the blue blanket", "a jar of honey", "the warm coat", "the old map")

# Small animals that need help, as (noun, what is wrong, wrong food, right food, its home).
FOUNDLINGS = (
    ("kitten", "It was cold and wet", "a leaf of lettuce", "a bowl of warm milk", "the barn"),
    ("duckling", "It was all alone", "a piece of cheese", "some soft oats", "the pond"),
    ("baby bird", "It was shivering", "a slice of cake", "a few small worms", "the nest"),
    ("baby rabbit", "One of its paws was hurt", "a bit of fish", "a sweet carrot", "the burrow"),
    ("baby squirrel", "It was very hungry", "a bowl of soup", "a handful of nuts", "the oak tree"),
    ("lamb", "It was thin and tired", "an old bone", "a bottle of milk", "the green field"),
)

# Broken things, as (noun, what it does, what goes wrong, false repair, its failure, tool, repair).
REPAIRS = (
    (
        "lamp",
        "lit up the whole room",
        "flickered and went out",
        "shook the lamp",
        "the room stayed dark",
        "a new bulb",
        "turned the new bulb into place",
    ),
    (
        "clock",
        "told everyone when to get up",
        "stopped at half past six",
        "hit the clock with a spoon",
        "one hand fell off",
        "a tiny key",
        "wound the spring with the tiny key",
    ),
    (
        "wagon",
        "carried wood from the forest",
        "lost a wheel with a loud crack",
        "tied the wheel on with grass",
        "the grass tore at the first stone",
        "a hammer and a peg",
        "fixed the wheel with the hammer and the peg",
    ),
    (
        "music box",
        "played a sweet song at bedtime",
        "made a crunch and fell silent",
        "blew into the music box",
        "it only coughed out some dust",
        "a drop of oil",
        "put the drop of oil on the little wheels",
    ),
    (
        "swing",
        "went higher than the fence",
        "fell to the ground when a rope broke",
        "tied the ends with thin thread",
        "the thread snapped at once",
        "a strong rope",
        "tied the strong rope with a double knot",
    ),
    (
        "tent",
        "kept out the wind and the rain",
        "tore from top to bottom",
        "stuck the tear together with honey",
        "only the ants were happy about it",
        "a needle and thread",
        "sewed up the tear with the needle and thread",
    ),
)

# Treats to share, as (plural noun, container, where they come from).
TREATS = (
    ("berries", "basket", "the woods"),
    ("apples", "sack", "the orchard"),
    ("nuts", "bag", "the old tree"),
    ("plums", "basket", "the garden"),
    ("buns", "box", "the bakery"),
    ("pears", "cart", "the farm"),
    ("cherries", "bucket", "the hill"),
)

# Seeds, as (seed, what grows).
SEEDS = (
    ("sunflower", "a sunflower as tall as a door"),
    ("pumpkin", "a pumpkin as round as the moon"),
    ("bean", "a bean plant that climbed up to the window"),
    ("carrot", "a row of sweet carrots"),
    ("strawberry", "a patch of red strawberries"),
    ("melon", "a green melon with stripes"),
)

# Precious things that break indoors.
VASES = (
    ("vase", "table", "ball", "threw"),
    ("cup", "shelf", "hoop", "rolled"),
    ("mirror", "wall", "ball", "kicked"),
    ("bowl", "table", "hat", "tossed"),
    ("jar", "shelf", "broom", "swung"),
    ("plate", "shelf", "rope", "swung"),
)
