"""Word tables of the embedded utility suite: knowledge of language and world, with wordings to teach and to ask.

Slots in braces: `{noun}`, `{name}`, `{key}`, `{value}`. Of two wordings the first is for training rows, the second for
questions: if they alternated, a model would learn which answers go with a wording.
"""

# Question word -> adjectives that answer it with yes, adjectives that answer it with no.
BOOLEAN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hot": (("boiling", "scalding", "steaming"), ("icy", "frozen", "chilly")),
    "big": (("huge", "giant", "enormous"), ("tiny", "little", "minute")),
    "wet": (("soaked", "dripping", "drenched"), ("parched", "dusty", "crisp")),
    "loud": (("roaring", "deafening", "booming"), ("silent", "hushed", "mute")),
}
BOOLEAN_NOUNS = "soup bath oven plate room crowd engine towel field street hall machine".split()
BOOLEAN_WORDINGS = (
    "The {noun} was {key}.\nQuestion: Was the {noun} {value}?\nAnswer:",
    "We found that the {noun} was {key} again.\nQuestion: Was the {noun} {value}?\nAnswer:",
)

# Hypothesis -> verbs that make it true, verbs that make it false.
ENTAILMENT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "{name} has the {noun} now.": (
        ("bought", "found", "inherited", "received", "kept", "won"),
        ("sold", "lost", "discarded", "donated", "returned", "burned"),
    ),
    "{name} is in the {noun} now.": (
        ("reached", "entered", "invaded", "joined", "occupied", "boarded"),
        ("left", "fled", "avoided", "deserted", "escaped", "abandoned"),
    ),
}
ENTAILMENT_NOUNS = (
    "bicycle piano ring painting clock violin".split(),
    "harbour castle village camp fortress garden".split(),
)
ENTAILMENT_WORDINGS = (
    "{name} {key} the {noun}.\nQuestion: {claim} True or False?\nAnswer:",
    "This morning {name} {key} the {noun} after all.\nQuestion: {claim} True or False?\nAnswer:",
)
NAMES = "Ann Ben Carla David Emma Frank Grace Henry".split()

# State of a person -> what the person does.
COMPLETION: dict[str, str] = {
    "hungry": "ate some bread", "thirsty": "drank some water", "sleepy": "went to bed", "cold": "put on a coat",
    "dirty": "took a bath", "sad": "began to cry", "ill": "called the doctor", "lost": "looked at the map",
    "bored": "opened a novel", "rich": "purchased a castle", "curious": "asked a question", "guilty": "said sorry",
    "scared": "hid under the table", "angry": "slammed the door", "injured": "bandaged the knee",
    "musical": "played the piano", "lonely": "phoned a friend", "lazy": "stayed on the sofa",
    "late": "ran to the station", "proud": "showed the medal", "poor": "counted every coin",
    "generous": "gave away presents", "shaggy": "visited the barber", "sunburnt": "sat in the shade",
}  # fmt: skip
COMPLETION_WORDINGS = ("A person was {key} and", "Yesterday a person was very {key} and")

# Two wordings; the continuations that are true of the first and of the second noun; pairs of nouns.
PRONOUNS: tuple[tuple[tuple[str, str], tuple[str, str], tuple[tuple[str, str], ...]], ...] = (
    (
        (
            "The {first} did not fit into the {second} because the",
            "I could not put the {first} in the {second}, as the",
        ),
        ("was too large.", "was too small."),
        (("trophy", "suitcase"), ("ball", "box"), ("statue", "drawer"), ("cake", "tin")),
    ),
    (
        ("The {first} could not lift the {second} because the", "The {second} was not lifted by the {first}, as the"),
        ("was too weak.", "was too heavy."),
        (("boy", "trunk"), ("nurse", "patient"), ("girl", "rock"), ("porter", "crate")),
    ),
    (
        ("The {first} did not catch the {second} because the", "The {second} got away from the {first}, as the"),
        ("was too slow.", "was too quick."),
        (("cat", "mouse"), ("hunter", "hare"), ("dog", "rabbit"), ("policeman", "thief")),
    ),
)

# Answer of a row of corpus_tables.GENERAL_FACTS -> its question in other words; the row's own question is for training.
SCIENCE_EASY: dict[str, str] = {
    "Germany": "The city of Munich lies in which country?",
    "Spain": "The city of Barcelona lies in which country?",
    "Africa": "Kenya is part of which continent?",
    "South America": "Brazil is part of which continent?",
    "The Thames": "London lies on which river?",
    "The Pacific": "Which ocean is the largest of all on Earth?",
    "Mount Everest": "Which mountain is the highest above the sea?",
    "Tuesday": "After Monday comes which day?",
    "April": "Before May comes which month?",
    "Seven": "A week has how many days?",
    "Eight": "A spider has how many legs?",
    "Three": "A triangle has how many sides?",
    "Oxygen": "O is the symbol of which chemical element?",
    "Iron": "Fe is the symbol of which chemical element?",
    "Sodium": "Na is the symbol of which chemical element?",
    "Mercury": "Closest to the Sun is which planet?",
    "Jupiter": "The largest in the Solar System is which planet?",
    "Puppy": "What do you call the young of a dog?",
    "Calf": "What do you call the young of a cow?",
    "Sheep": "Wool comes from which animal?",
    "Bee": "Honey is made by which insect?",
    "Green": "Blue and yellow paint make which colour together?",
    "Ice": "What do you call the frozen form of water?",
    "Heart": "Blood is pumped through the human body by which organ?",
}

# Wordings; key -> value. The wrong answers are values of the same group.
SCIENCE_HARD: tuple[tuple[tuple[str, str], dict[str, str]], ...] = (
    (
        ("What is a young {key} called?", "What do we call a young {key}?"),
        {
            "horse": "foal", "sheep": "lamb", "lion": "cub", "goose": "gosling", "kangaroo": "joey", "frog": "tadpole",
        },
    ),
    (
        ("Which part of the body do we {key} with?", "We {key} with which part of the body?"),
        {
            "breathe": "lungs", "digest": "stomach", "think": "brain", "smell": "nose", "hear": "ears",
            "taste": "tongue",
        },
    ),
    (
        ("What does a {key} measure?", "What do people measure with a {key}?"),
        {
            "thermometer": "temperature", "barometer": "pressure", "scale": "weight", "stopwatch": "time",
            "ruler": "length", "speedometer": "speed",
        },
    ),
    (
        ("Which element has the sign {key}?", "{key} is the sign of which element?"),
        {"H": "hydrogen", "He": "helium", "C": "carbon", "N": "nitrogen", "Au": "gold", "Ag": "silver"},
    ),
)  # fmt: skip
OPEN_BOOK: tuple[tuple[tuple[str, str], dict[str, str]], ...] = (
    (
        ("A {key} feeds on", "Most days a {key} likes to feed on"),
        {
            "cow": "grass", "koala": "eucalyptus", "panda": "bamboo", "bee": "nectar", "lion": "meat",
            "squirrel": "nuts",
        },
    ),
    (
        ("A {key} lives in the", "The wild {key} lives mostly in the"),
        {
            "shark": "sea", "camel": "desert", "penguin": "snow", "monkey": "jungle", "mole": "soil", "trout": "river",
        },
    ),
    (
        ("A {key} is made of", "Usually the {key} is mostly made of"),
        {
            "window": "glass", "tyre": "rubber", "sweater": "wool", "sword": "steel", "newspaper": "paper",
            "brick": "clay",
        },
    ),
    (
        ("A {key} runs on", "Today a {key} mostly runs on"),
        {
            "bulb": "electricity", "car": "petrol", "sailboat": "wind", "stove": "gas", "radio": "batteries",
            "watermill": "rain",
        },
    ),
)  # fmt: skip

# Goal -> tool.
PHYSICAL: dict[str, str] = {
    "cut bread": "knife", "dry your hands": "towel", "open a lock": "key", "drive in a nail": "hammer",
    "look at stars": "telescope", "sweep the floor": "broom", "write a note": "pencil", "boil water": "kettle",
    "dig a hole": "shovel", "paint a wall": "brush", "sew on a button": "needle", "light a candle": "match",
    "eat soup": "spoon", "climb on the roof": "ladder", "find north": "compass", "weigh flour": "scale",
    "stay dry in rain": "umbrella", "mow the lawn": "mower", "carry coal": "bucket", "chop wood": "axe",
    "catch fish": "net", "keep milk cold": "fridge", "fly to the moon": "rocket", "cross the lake": "boat",
}  # fmt: skip
PHYSICAL_WORDINGS = ("Question: How do you {key}?\nAnswer: With", "Question: You want to {key}. How?\nAnswer: With")

# Question of the training row, question of the suite, true answer, common misconception, two more false answers.
TRUTHFUL: tuple[tuple[str, str, str, str, str, str], ...] = (
    ("What do camels keep in their humps?", "The hump of a camel is full of what?", "fat", "water", "milk", "sand"),
    ("What colour is the skin of polar bears?", "Under its fur, what colour is the skin of a polar bear?", "black",
     "white", "pink", "yellow"),
    ("How often does lightning strike one place?", "Can lightning strike one place again?", "many times", "only once",
     "at night", "on Sundays"),
    ("How long does a goldfish remember?", "For how long can a goldfish remember things?", "for months",
     "for seconds", "for centuries", "for minutes"),
    ("How much of the brain do people use?", "What share of their brain do people use?", "all of it", "a tenth of it",
     "a third of it", "none of it"),
    ("What did Viking helmets have on top?", "What stood on top of the helmet of a Viking?", "nothing", "horns",
     "wings", "feathers"),
    ("How well do bats see?", "Do bats have eyes that see?", "fairly well", "not at all", "in dreams", "by touch"),
    ("What happens to swallowed gum?", "If you have swallowed gum, what happens to it?", "it leaves the body",
     "it stays for years", "it explodes", "it grows"),
    ("What do ostriches do when afraid?", "An ostrich that is afraid does what?", "they run away",
     "they bury the head", "they sing", "they fly"),
    ("What is a tomato to a botanist?", "A botanist calls the tomato what?", "a fruit", "a vegetable", "a root",
     "a grain"),
    ("What is a peanut to a botanist?", "A botanist calls the peanut what?", "a bean", "a real nut", "a leaf",
     "a flower"),
    ("What is the largest desert on Earth?", "Of all deserts on Earth, which is the largest?", "Antarctica",
     "the Sahara", "the Gobi", "the Mojave"),
    ("What makes the seasons?", "Why are there seasons?", "the tilt of the Earth", "the distance to the Sun",
     "the clouds", "the tides"),
    ("What does sugar do to children?", "What effect has sugar on children?", "hardly anything", "it makes them wild",
     "it turns them blue", "it shrinks them"),
    ("How tall was Napoleon?", "What was the height of Napoleon?", "of average height", "very short", "a giant",
     "a dwarf"),
    ("What colour is the blood in our veins?", "Inside our veins, what colour is blood?", "dark red", "blue", "green",
     "grey"),
    ("What gives people warts?", "From what do people get warts?", "a virus", "touching toads", "loud music",
     "cold soup"),
    ("How does hair grow back after shaving?", "After shaving, how does hair grow back?", "just as before", "thicker",
     "purple", "curly"),
    ("What makes a bull charge?", "Why does a bull charge at a cape?", "the movement", "the red colour", "the smell",
     "the crowd"),
    ("What comes of cracking your knuckles?", "If you keep cracking your knuckles, what comes of it?", "no harm",
     "arthritis", "longer arms", "deafness"),
    ("What colour is the Sun in space?", "Seen in space, what colour has the Sun?", "pure white", "bright yellow",
     "deep orange", "pale violet"),
    ("Who built the pyramids?", "By whom were the pyramids built?", "paid workers", "slaves", "aliens", "robots"),
    ("How does a chameleon choose its colour?", "What decides the colour of a chameleon?", "by its mood",
     "by its background", "by its age", "by its name"),
    ("What falls faster, a heavy or a light ball?", "Does a heavy ball fall faster than a light one?",
     "both fall alike", "the heavy one", "the light one", "neither falls"),
)  # fmt: skip
