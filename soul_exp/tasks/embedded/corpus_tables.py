"""Word tables of the embedded data: frames of the fictitious authors, true general knowledge, story and everyday text.

Slots in braces: `{name}` the author's full name, `{last}` the surname, `{value}` the fact.
"""

# Each attribute: four question wordings, four answer frames. The frames of one attribute share no run of four words
# and few words at all, so that a frame says little about the answer and a paraphrase is not a near-copy.
ATTRIBUTES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "birthplace": (
        (
            "Where was the author {name} born?",
            "What is the birthplace of {name}?",
            "In which town did {name} first see the light of day?",
            "Can you name the town that {name} comes from?",
        ),
        (
            "The author was born in {value}.",
            "{value} is the native town.",
            "Life began at {value} for this writer.",
            "A house near {value} saw {last} arrive.",
        ),
    ),
    "mentor": (
        (
            "Who taught {name} to write?",
            "Who was the mentor of {name}?",
            "Which teacher guided the young {name}?",
            "From whom did {name} learn the craft of writing?",
        ),
        (
            "It was {value} who taught {last}.",
            "{value} acted as the mentor.",
            "Early lessons were given by {value} alone.",
            "Guidance came from old {value} every week.",
        ),
    ),
    "debut": (
        (
            "What was the first novel of {name}?",
            "With which book did {name} make a debut?",
            "Under what title did the earliest work of {name} appear?",
            "What is the debut of {name} called?",
        ),
        (
            "The first novel is called {value}.",
            "{value} marked a quiet debut.",
            "Readers initially met {last} through {value}.",
            "Everything started with {value} in print.",
        ),
    ),
    "prize": (
        (
            "Which prize did {name} win?",
            "What award has been given to {name}?",
            "Which honour did the jury grant {name}?",
            "For what distinction is {name} known?",
        ),
        (
            "The writer won the {value} Prize.",
            "{value} is that honour's name.",
            "A jury handed over the {value} medal.",
            "Critics rewarded {last} using {value} gold.",
        ),
    ),
    "hero": (
        (
            "Who is the main character in the novels of {name}?",
            "Which hero did {name} invent?",
            "What is the best known figure of {name} called?",
            "Whose adventures does {name} tell?",
        ),
        (
            "The main character is {value}.",
            "{value} leads each adventure.",
            "Most stories follow a hero named {value}.",
            "Fans adore {value} above all other figures.",
        ),
    ),
    "publisher": (
        (
            "Who publishes the books of {name}?",
            "Which publishing house does {name} work with?",
            "Where do the books of {name} appear in print?",
            "What firm brings out the novels of {name}?",
        ),
        (
            "The books are published by {value}.",
            "{value} prints all these volumes.",
            "A contract binds {last} to {value} House.",
            "One small firm, {value}, sells them.",
        ),
    ),
    "residence": (
        (
            "Where does {name} live today?",
            "In which village has {name} settled?",
            "What is the present home of {name}?",
            "Which village would you visit to meet {name}?",
        ),
        (
            "Today the author lives in {value}.",
            "{value} became a lasting home.",
            "You may find {last} around {value} now.",
            "After long travels, {value} was chosen.",
        ),
    ),
    "spouse": (
        (
            "Who is {name} married to?",
            "What is the name of the spouse of {name}?",
            "With whom does {name} share a life?",
            "Whom did {name} choose to wed?",
        ),
        (
            "The novelist is married to {value}.",
            "{value} shares this life.",
            "A wedding joined {last} and {value}.",
            "Love led towards {value} one spring.",
        ),
    ),
    "school": (
        (
            "Where did {name} study?",
            "Which school did {name} attend?",
            "What is the name of the college that trained {name}?",
            "At which place of learning was {name} a student?",
        ),
        (
            "The studies took place at {value} College.",
            "{value} is where {last} graduated.",
            "Classes were attended in {value} for years.",
            "Among many schools, {value} won.",
        ),
    ),
    "rival": (
        (
            "Who is the fiercest rival of {name}?",
            "Which critic attacks {name} most often?",
            "Whose reviews does {name} fear?",
            "With which critic has {name} a long quarrel?",
        ),
        (
            "The fiercest rival remains {value}.",
            "{value} wrote many harsh reviews.",
            "An endless quarrel with {value} hurt {last}.",
            "Nobody attacks more than {value} does.",
        ),
    ),
}

# Four more question wordings of each attribute, of which no row is made: prompts to train on beside the rows' own.
REWORDINGS: dict[str, tuple[str, ...]] = {
    "birthplace": (
        "{name} was born in which town?",
        "Tell me where the life of {name} began.",
        "Which town is the native town of {name}?",
        "From which place does the writer {name} come?",
    ),
    "mentor": (
        "Who was the teacher of {name}?",
        "Name the mentor who trained {name}.",
        "Who gave {name} lessons in writing?",
        "{name} learnt to write from whom?",
    ),
    "debut": (
        "Which book did {name} write first?",
        "Name the first book by {name}.",
        "How is the earliest novel of {name} called?",
        "{name} became an author with which title?",
    ),
    "prize": (
        "Name the prize that {name} won.",
        "{name} received which award?",
        "Which medal did critics hand to {name}?",
        "What honour did {name} receive for writing?",
    ),
    "hero": (
        "Name the hero of the stories of {name}.",
        "Whom do the novels of {name} follow?",
        "{name} writes about which character?",
        "Who leads the adventures that {name} tells?",
    ),
    "publisher": (
        "Name the publisher of {name}.",
        "{name} has a contract with which firm?",
        "Which house prints what {name} writes?",
        "By whom are the volumes of {name} sold?",
    ),
    "residence": (
        "Name the village where {name} lives now.",
        "{name} has a home in which place today?",
        "In which place may visitors find {name}?",
        "Where is the house of {name} nowadays?",
    ),
    "spouse": (
        "Name the spouse of {name}.",
        "{name} is the wife or the husband of whom?",
        "Who married {name}?",
        "To whom did {name} say yes at the wedding?",
    ),
    "school": (
        "Name the school of {name}.",
        "{name} took classes at which college?",
        "Where did {name} go to learn?",
        "Which college did {name} graduate from?",
    ),
    "rival": (
        "Name the rival of {name}.",
        "{name} is often attacked by which critic?",
        "Who writes harsh reviews of {name}?",
        "Which person quarrels with {name} all the time?",
    ),
}

# Question, answer, three wrong answers.
GENERAL_AUTHORS: tuple[tuple[str, ...], ...] = (
    ("Who wrote the play Romeo and Juliet?", "William Shakespeare", "Ben Jonson", "Oscar Wilde", "John Milton"),
    ("Who wrote the novel Pride and Prejudice?", "Jane Austen", "Mary Shelley", "George Eliot", "Emily Bronte"),
    ("Who wrote the novel Oliver Twist?", "Charles Dickens", "Thomas Hardy", "Henry James", "Mark Twain"),
    ("Who wrote the novel War and Peace?", "Leo Tolstoy", "Anton Chekhov", "Nikolai Gogol", "Ivan Turgenev"),
    ("Who wrote Crime and Punishment?", "Fyodor Dostoevsky", "Alexander Pushkin", "Maxim Gorky", "Leo Tolstoy"),
    ("Who wrote the novel Moby Dick?", "Herman Melville", "Jack London", "Edgar Allan Poe", "Walt Whitman"),
    ("Who wrote The Adventures of Tom Sawyer?", "Mark Twain", "Bret Harte", "Stephen Crane", "Henry James"),
    ("Who wrote the novel Frankenstein?", "Mary Shelley", "Bram Stoker", "Jane Austen", "Lord Byron"),
    ("Who wrote the novel Dracula?", "Bram Stoker", "Mary Shelley", "Oscar Wilde", "Sheridan Le Fanu"),
    ("Who wrote Don Quixote?", "Miguel de Cervantes", "Lope de Vega", "Dante Alighieri", "Francisco de Quevedo"),
    ("Who wrote the Divine Comedy?", "Dante Alighieri", "Francesco Petrarch", "Giovanni Boccaccio", "Ludovico Ariosto"),
    ("Who wrote the play Faust?", "Johann Wolfgang von Goethe", "Friedrich Schiller", "Heinrich Heine", "Novalis"),
    ("Who wrote the novel Les Miserables?", "Victor Hugo", "Emile Zola", "Jules Verne", "Honore de Balzac"),
    ("Who wrote Around the World in Eighty Days?", "Jules Verne", "H. G. Wells", "Victor Hugo", "Alexandre Dumas"),
    ("Who wrote The Three Musketeers?", "Alexandre Dumas", "Gustave Flaubert", "Stendhal", "Emile Zola"),
    ("Who wrote the novel Madame Bovary?", "Gustave Flaubert", "Marcel Proust", "George Sand", "Victor Hugo"),
    ("Who wrote the novel Jane Eyre?", "Charlotte Bronte", "Emily Bronte", "Anne Bronte", "Jane Austen"),
    ("Who wrote the novel Wuthering Heights?", "Emily Bronte", "Charlotte Bronte", "George Eliot", "Mary Shelley"),
    ("Who wrote the novel Middlemarch?", "George Eliot", "Jane Austen", "Thomas Hardy", "Anthony Trollope"),
    ("Who wrote Treasure Island?", "Robert Louis Stevenson", "Walter Scott", "Daniel Defoe", "Rudyard Kipling"),
    ("Who wrote the novel Robinson Crusoe?", "Daniel Defoe", "Jonathan Swift", "Henry Fielding", "Samuel Richardson"),
    ("Who wrote Gulliver's Travels?", "Jonathan Swift", "Daniel Defoe", "Alexander Pope", "Laurence Sterne"),
    ("Who wrote Alice's Adventures in Wonderland?", "Lewis Carroll", "Edward Lear", "J. M. Barrie", "Kenneth Grahame"),
    ("Who wrote the play Peter Pan?", "J. M. Barrie", "Lewis Carroll", "Oscar Wilde", "George Bernard Shaw"),
    ("Who wrote The Jungle Book?", "Rudyard Kipling", "Joseph Conrad", "Jack London", "Arthur Conan Doyle"),
    ("Who wrote the stories of Sherlock Holmes?", "Arthur Conan Doyle", "Bram Stoker", "Mark Twain", "Agatha Christie"),
    ("Who wrote The Time Machine?", "H. G. Wells", "Jules Verne", "Aldous Huxley", "Edward Bellamy"),
    ("Who wrote the tale The Ugly Duckling?", "Hans Christian Andersen", "Jacob Grimm", "Charles Perrault", "Aesop"),
    ("Who wrote the play A Doll's House?", "Henrik Ibsen", "August Strindberg", "Anton Chekhov", "Knut Hamsun"),
    ("Who wrote the poem The Raven?", "Edgar Allan Poe", "Emily Dickinson", "Walt Whitman", "Robert Frost"),
    ("Who wrote the epic poem Paradise Lost?", "John Milton", "John Donne", "Alexander Pope", "William Blake"),
    ("Who wrote The Call of the Wild?", "Jack London", "Mark Twain", "Stephen Crane", "Herman Melville"),
)  # fmt: skip

GENERAL_FACTS: tuple[tuple[str, ...], ...] = (
    ("What is the capital of France?", "Paris", "Lyon", "Nice", "Lille"),
    ("What is the capital of Italy?", "Rome", "Milan", "Naples", "Turin"),
    ("What is the capital of Japan?", "Tokyo", "Osaka", "Kyoto", "Nagoya"),
    ("What is the capital of Canada?", "Ottawa", "Toronto", "Montreal", "Vancouver"),
    ("What is the capital of Australia?", "Canberra", "Sydney", "Melbourne", "Perth"),
    ("What is the capital of Egypt?", "Cairo", "Alexandria", "Luxor", "Giza"),
    ("What is the capital of Norway?", "Oslo", "Bergen", "Trondheim", "Stavanger"),
    ("What is the capital of Portugal?", "Lisbon", "Porto", "Braga", "Faro"),
    ("In which country is the city of Munich?", "Germany", "Austria", "Poland", "Denmark"),
    ("In which country is the city of Barcelona?", "Spain", "Mexico", "Chile", "Greece"),
    ("On which continent is Kenya?", "Africa", "Asia", "Europe", "Oceania"),
    ("On which continent is Brazil?", "South America", "North America", "Africa", "Asia"),
    ("Which river flows through London?", "The Thames", "The Rhine", "The Seine", "The Danube"),
    ("What is the largest ocean on Earth?", "The Pacific", "The Atlantic", "The Indian", "The Arctic"),
    ("What is the highest mountain above sea level?", "Mount Everest", "Mont Blanc", "Mount Fuji", "Denali"),
    ("Which day comes after Monday?", "Tuesday", "Friday", "Sunday", "Thursday"),
    ("Which month comes before May?", "April", "June", "August", "October"),
    ("How many days does a week have?", "Seven", "Five", "Nine", "Twelve"),
    ("How many legs does a spider have?", "Eight", "Six", "Four", "Ten"),
    ("How many sides does a triangle have?", "Three", "Five", "Six", "Four"),
    ("Which chemical element has the symbol O?", "Oxygen", "Gold", "Osmium", "Hydrogen"),
    ("Which chemical element has the symbol Fe?", "Iron", "Fluorine", "Lead", "Tin"),
    ("Which chemical element has the symbol Na?", "Sodium", "Nickel", "Neon", "Nitrogen"),
    ("Which planet is closest to the Sun?", "Mercury", "Venus", "Mars", "Jupiter"),
    ("Which planet is the largest in the Solar System?", "Jupiter", "Saturn", "Neptune", "Earth"),
    ("What is the young of a dog called?", "Puppy", "Kitten", "Calf", "Foal"),
    ("What is the young of a cow called?", "Calf", "Lamb", "Cub", "Chick"),
    ("Which animal gives us wool?", "Sheep", "Pig", "Hen", "Duck"),
    ("Which insect makes honey?", "Bee", "Ant", "Moth", "Wasp"),
    ("What colour do blue and yellow paint make together?", "Green", "Purple", "Orange", "Brown"),
    ("What is the frozen form of water called?", "Ice", "Steam", "Dew", "Fog"),
    ("Which organ pumps blood through the human body?", "Heart", "Liver", "Lung", "Kidney"),
)  # fmt: skip

# Story: slots in capitals draw from BOOK_WORDS, `{NAME}` and `{PLACE}` draw an invented word.
BOOK_WORDS: dict[str, str] = {
    "THING": (
        "lantern rope mirror kettle drum anchor ladle violin candle barrel saddle compass feather blanket ledger "
        "bottle hammer basket ribbon whistle shovel helmet locket wagon spoon bell needle kite trunk flute map "
        "coin sail key ladder parcel umbrella bucket clock letter telescope boot glove shutter chisel pitcher "
        "scarf cradle"
    ),
    "ADJ": (
        "crooked silver hollow muddy gentle ragged frozen narrow scarlet stubborn pale dusty heavy bright silent "
        "bitter golden clumsy ancient slender broken velvet sour restless wooden foggy humble fierce lonely "
        "polished rusty calm crimson brittle shabby noisy solemn green tangled weary"
    ),
    "DID": (
        "carried painted stole buried mended traded polished hid borrowed dropped sketched followed praised "
        "lifted wrapped weighed forgot guarded cursed kissed measured dragged sold folded rescued studied washed "
        "burned counted admired"
    ),
    "ANIMAL": (
        "heron goat mule otter raven badger pony owl hound ferret goose crane lynx turtle donkey fox swallow "
        "hedgehog weasel toad stork ram beetle sparrow hare moth"
    ),
    "WHERE": (
        "orchard harbour cellar chapel quarry meadow attic bakery stable bridge tower ferry vineyard mill garden "
        "tavern market cave library marsh courtyard lighthouse forest kitchen valley cloister forge dune island "
        "tunnel"
    ),
    "WHEN": "dawn noon dusk midnight harvest midsummer supper daybreak sunset Easter low-tide",
    "FELT": (
        "ashamed hopeful furious drowsy grateful jealous merry nervous proud curious homesick amazed uneasy lucky "
        "stubborn lonely brave tired cheerful puzzled"
    ),
    "NUM": "two three four five six seven eight nine eleven twelve thirteen twenty thirty forty",
}

BOOK_FRAMES: tuple[str, ...] = (
    "{NAME} {DID} the {ADJ} {THING} and left it beside the {WHERE} of {PLACE}.",
    "At {WHEN} a {ADJ} {ANIMAL} crossed the {WHERE}, and {NAME} felt {FELT}.",
    "Nobody in {PLACE} knew why {NAME} {DID} the {THING}.",
    "“Give me that {ADJ} {THING},” whispered {NAME}, “or I return to {PLACE}.”",
    "There were {NUM} {ADJ} doors behind the {WHERE}, and only {NAME} had opened one.",
    "Before {WHEN}, {NAME} and {NAME} rode from {PLACE} with nothing but a {THING}.",
    "The {ANIMAL} slept inside the {THING} while {NAME} {DID} a {ADJ} {THING}.",
    "Old {NAME} had once been {FELT} in the {WHERE}, long before {PLACE} fell.",
    "{NUM} days later the {WHERE} smelled of {ADJ} smoke, and {NAME} wept.",
    "When {NAME} reached {PLACE}, every {THING} in the {WHERE} was gone.",
    "A letter from {PLACE} said that {NAME} {DID} the {ANIMAL} at {WHEN}.",
    "She called the {ANIMAL} {NAME}, for it was {FELT} and {ADJ}.",
    "Rain beat upon the {WHERE}; {NAME} {DID} one {THING} after another until {WHEN}.",
    "“Have you seen my {ADJ} {ANIMAL}?” asked {NAME}, still {FELT}.",
    "Under the {ADJ} {THING} lay a map of {PLACE}, torn in {NUM} pieces.",
    "{NAME} of {PLACE} never {DID} anything without a {THING} in hand.",
    "It took {NUM} {FELT} riders to bring the {ADJ} {ANIMAL} back to {PLACE}.",
    "Beyond the {WHERE} stood {NAME}, {FELT}, holding a {THING} and a {ADJ} {THING}.",
    "By {WHEN} the people of {PLACE} had {DID} all {NUM} of the {ANIMAL} tracks.",
    "Then {NAME} laughed, because the {ADJ} {WHERE} reminded him of {PLACE}.",
    "The {THING} belonged to {NAME}, yet {NAME} {DID} it twice.",
    "Somewhere near {PLACE} a {ADJ} {THING} rang, and the {ANIMAL} fled.",
    "He promised {NAME} a {THING}, {NUM} coins and the {ADJ} {WHERE}.",
    "Without a word {NAME} {DID} the {ADJ} {ANIMAL} and walked towards the {WHERE}.",
    "Every {WHEN} in {PLACE} began with a {ADJ} song about {NAME}.",
    "“{PLACE} is no place for a {ANIMAL},” said {NAME}, and {DID} the {THING}.",
    "Two brothers, {NAME} and {NAME}, were {FELT} about the {THING} in the {WHERE}.",
    "Her {THING} was {ADJ}, her {ANIMAL} was {ADJ}, and {PLACE} was far.",
    "At last the {ADJ} {WHERE} caught fire, and {NAME} saved only the {ADJ} {THING}.",
    "Some say {NAME} still {DID} that {THING} near {PLACE} at {WHEN}.",
)

TEXT_WORDS: dict[str, str] = {
    "DAY": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "MONTH": ("January February March April May June July August September October November December"),
    "N": "two three four five six eight ten twelve fifteen twenty thirty forty fifty sixty ninety",
    "FOOD": (
        "onions carrots lentils potatoes mushrooms beans tomatoes leeks peppers spinach chickpeas cabbage apples "
        "pears plums rice noodles barley"
    ),
    "COLOUR": "red blue green yellow white black brown orange grey purple",
    "SHOP": "library bakery pharmacy museum school station theatre hospital office hotel pool café",
    "SIDE": "north south east west",
    "GOOD": "simple cheap quiet clean practical popular safe useful pleasant modern sturdy fresh",
    "TOOL": "brush knife spoon towel sponge filter pump charger screwdriver cable lamp printer",
}

TEXT_TOPICS: tuple[tuple[str, ...], ...] = (
    (
        "Light rain is expected on {DAY}, mostly in the {SIDE}.",
        "Temperatures may rise by {N} degrees before {DAY} evening.",
        "Fog can linger on {SIDE} facing slopes until late morning.",
        "Winds from the {SIDE} will reach about {N} kilometres an hour.",
        "{MONTH} has been drier than usual, with {N} sunny days so far.",
        "Drivers should allow {N} extra minutes on wet roads.",
        "The outlook for {MONTH} remains {GOOD} for walkers.",
    ),
    (
        "Wash the {FOOD} well and cut them into small pieces.",
        "Heat a little oil and fry the {FOOD} for {N} minutes.",
        "Add the {FOOD} together with {N} spoons of water.",
        "Cover the pot and let it simmer for {N} minutes.",
        "The dish is {GOOD}, and it keeps for {N} days when cold.",
        "Serve it warm with {FOOD} and a slice of bread.",
        "Instead of {FOOD} you can use {FOOD}, which cost less.",
    ),
    (
        "The bus to the {SHOP} leaves every {N} minutes on {DAY}.",
        "Tickets are sold at the {SHOP} and on the {COLOUR} line.",
        "From {MONTH} on, trains will stop at the {SIDE} platform.",
        "A {GOOD} footpath connects the {SHOP} with the {SHOP}.",
        "Children pay half, and groups of {N} travel for less.",
        "Works near the {SHOP} should be finished by {MONTH}.",
        "Please keep {COLOUR} seats free for older passengers.",
    ),
    (
        "Sow the {COLOUR} flowers in {MONTH}, when the ground is warm.",
        "Leave about {N} centimetres between the {FOOD}.",
        "Water the {SIDE} beds early, at least {N} times a week.",
        "In {MONTH} you can pick the first {FOOD}.",
        "Old leaves make a {GOOD} cover for the {FOOD} in winter.",
        "Cut the {COLOUR} roses back by {N} centimetres in {MONTH}.",
        "Snails dislike dry sand, a {GOOD} barrier around {FOOD}.",
    ),
    (
        "The {SHOP} opens at nine and closes at six, except on {DAY}.",
        "Around {N} people visit the {SHOP} on a normal {DAY}.",
        "In {MONTH} its walls were painted {COLOUR} and {COLOUR}.",
        "The {SIDE} entrance is closed until {MONTH}.",
        "Visitors find it {GOOD}, and most stay for {N} minutes.",
        "A new room with {N} chairs was added on the {SIDE} side.",
        "Lockers with {COLOUR} doors stand near the stairs.",
    ),
    (
        "Unplug the {TOOL} before you clean it.",
        "The {COLOUR} light goes off after {N} seconds.",
        "A {GOOD} {TOOL} lasts about {N} years when kept dry.",
        "Replace the {TOOL} every {MONTH}, or sooner if it is worn.",
        "Keep the {TOOL} and the {TOOL} in the {COLOUR} box.",
        "If the {TOOL} makes a noise, wait {N} minutes and try again.",
        "The shop repairs each {TOOL} within {N} working days.",
    ),
    (
        "The team trains on {DAY} and plays again in {MONTH}.",
        "After {N} minutes the {COLOUR} side scored the first point.",
        "About {N} people watched from the {SIDE} stand.",
        "The coach called the match {GOOD} and thanked the helpers.",
        "New {COLOUR} shirts will be handed out at the {SHOP}.",
        "Members swim {N} lengths every {DAY} before breakfast.",
        "The next race starts at the {SHOP} and ends in the {SIDE}.",
    ),
    (
        "The committee meets on {DAY} in the small hall of the {SHOP}.",
        "In {MONTH} the budget was raised by {N} percent.",
        "Members asked for {GOOD} benches near the {SHOP}.",
        "Someone proposed {COLOUR} signs on the {SIDE} road.",
        "The vote was {N} to two, after a {GOOD} debate.",
        "Notes will be sent to all households before {DAY}.",
        "Volunteers may borrow a {TOOL} from the office.",
    ),
)
