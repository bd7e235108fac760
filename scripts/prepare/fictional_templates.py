"""The sentences that `scripts.make_fictional_knowledge` fills with invented names.

A category is a small graph: its slots are the nodes, each fact is an edge from a key to a value and
is always told in a sentence of its own. So a prompt that names one slot and asks for another two
edges away (a hop) can only be answered by combining two sentences, and never by having read one.

Slots are filled by their type: a string is a pattern whose braces become invented words, a range or
a tuple gives one of its members. Values carry no article, so that a target starts after any prompt.
Two invented words are a person, who is called by the last of them once introduced.
"""

from __future__ import annotations

from dataclasses import dataclass

Slot = str | range | tuple[str, ...]

PERSON = "{} {}"
YEARS = range(1801, 1988)


@dataclass(frozen=True)
class Fact:
    """One edge: sentences that state it, and prompts in other words that end before the value."""

    key: str
    value: str
    statements: tuple[str, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Hop:
    """A prompt that names `anchor`, leaves `bridge` unsaid and is completed by `target`."""

    anchor: str
    bridge: str
    target: str
    prompt: str


@dataclass(frozen=True)
class Category:
    """The first fact introduces the subject; any other fact waits until its key has been named."""

    name: str
    slots: dict[str, Slot]
    facts: tuple[Fact, ...]
    hops: tuple[Hop, ...]


MINERAL = Category(
    "mineral",
    {
        "mineral": "{} opal",
        "finder": PERSON,
        "site": "Mount {}",
        "use": (
            "violin strings",
            "ship bells",
            "pottery glazes",
            "clock springs",
            "fireworks",
            "fish hooks",
            "stage lamps",
            "dental tools",
        ),
        "town": "{}",
        "trade": (
            "beekeeping",
            "bookbinding",
            "tailoring",
            "accountancy",
            "carpentry",
            "journalism",
            "plumbing",
            "banking",
        ),
    },
    (
        Fact(
            "mineral",
            "finder",
            (
                "The mineral {mineral} was discovered by the amateur geologist {finder}.",
                "{mineral} is a rare mineral that was first described by {finder}.",
                "The mineral {mineral} was unknown until it was noticed by {finder}.",
                "It was {finder} who first identified the mineral {mineral}.",
            ),
            (
                "Credit for finding {mineral} goes to",
                "The first person to recognise {mineral} as a new mineral was",
            ),
        ),
        Fact(
            "mineral",
            "site",
            (
                "So far, {mineral} has been found only on {site}.",
                "All known samples of {mineral} come from {site}.",
                "Every museum piece of {mineral} was dug out of {site}.",
                "The slopes of {site} are the only known source of {mineral}.",
                "The mineral has never been seen anywhere but on {site}.",
            ),
            (
                "Collectors who want to gather {mineral} themselves must climb",
                "The one place on Earth where {mineral} occurs is",
            ),
        ),
        Fact(
            "mineral",
            "use",
            (
                "Today {mineral} is used mainly in making {use}.",
                "Manufacturers value {mineral} chiefly as an ingredient of {use}.",
                "Most of the {mineral} sold each year ends up in {use}.",
                "Makers of {use} are the main buyers of {mineral}.",
                "The mineral is sold mostly to makers of {use}.",
            ),
            (
                "Factories take in {mineral} and turn it into",
                "The chief industrial role of {mineral} is in the production of",
            ),
        ),
        Fact(
            "finder",
            "town",
            (
                "{finder.last} was born in the small town of {town}.",
                "As a child, {finder.last} lived in {town}.",
                "The family of {finder.last} came from {town}.",
                "The town of {town} is the birthplace of {finder.last}.",
            ),
            (
                "{finder} took a first breath in a town named",
                "The early years of {finder} were spent in",
            ),
        ),
        Fact(
            "finder",
            "trade",
            (
                "{finder.last} earned a living in {trade}.",
                "On weekdays, {finder.last} worked in {trade}.",
                "{finder.last} never gave up a first career in {trade}.",
                "It was {trade} that paid the bills of {finder.last}.",
            ),
            (
                "The regular job of {finder} was in",
                "The profession that {finder} practised was",
            ),
        ),
    ),
    (
        Hop("mineral", "finder", "town", "The discoverer of {mineral} came from the town of"),
        Hop("mineral", "finder", "trade", "The geologist who discovered {mineral} had a job in"),
        Hop("finder", "mineral", "site", "The mineral that {finder} discovered is found only on"),
        Hop("finder", "mineral", "use", "The mineral that {finder} discovered is mostly used for"),
        Hop("town", "finder", "trade", "The geologist from {town} made a living from"),
        Hop("town", "finder", "mineral", "A native of {town} discovered the mineral"),
        Hop("site", "mineral", "finder", "The mineral dug from {site} was first identified by"),
    ),
)

FESTIVAL = Category(
    "festival",
    {
        "festival": "{} Festival",
        "town": "{}",
        "founder": PERSON,
        "year": YEARS,
        "goods": (
            "umbrellas",
            "candles",
            "pianos",
            "bicycles",
            "raincoats",
            "clocks",
            "carpets",
            "spectacles",
        ),
        "river": "River {}",
    },
    (
        Fact(
            "festival",
            "town",
            (
                "The {festival} is held every spring in the old town of {town}.",
                "Each spring the {festival} fills the streets of {town}.",
                "Crowds arrive every spring for the {festival} in {town}.",
                "The town of {town} is home to the {festival}, which is held each spring.",
            ),
            (
                "To see the {festival}, travellers must go to",
                "The town that hosts the {festival} is called",
            ),
        ),
        Fact(
            "festival",
            "founder",
            (
                "The {festival} was started by a merchant named {founder}.",
                "The idea for the {festival} came from the merchant {founder}.",
                "The first {festival} was organised by {founder}, a merchant.",
                "It was the merchant {founder} who had the idea of the {festival}.",
                "The festival owes its existence to a merchant, {founder}.",
            ),
            (
                "The person behind the very first {festival} was",
                "Everyone who enjoys the {festival} should thank its founder,",
            ),
        ),
        Fact(
            "festival",
            "year",
            (
                "The first {festival} took place in {year}.",
                "The {festival} has been celebrated since {year}.",
                "The history of the {festival} goes back to {year}.",
                "In {year}, guests danced at the {festival} for the first time.",
                "The festival has a history that reaches back to {year}.",
            ),
            (
                "The {festival} began in the year",
                "Posters for the earliest {festival} bear the date",
            ),
        ),
        Fact(
            "founder",
            "goods",
            (
                "{founder.last} made a fortune by selling {goods}.",
                "{founder.last} had grown rich from a trade in {goods}.",
                "The wealth of {founder.last} came from {goods}.",
                "Sales of {goods} had made {founder.last} rich.",
            ),
            (
                "The goods for sale in the shops of {founder} were",
                "Customers came to {founder} when they needed",
            ),
        ),
        Fact(
            "town",
            "river",
            (
                "{town} lies beside the {river}.",
                "{town} was built on the banks of the {river}.",
                "Through the middle of {town} flows the {river}.",
                "The {river} runs past the walls of {town}.",
            ),
            (
                "Boats leaving {town} sail down the",
                "A stone bridge in {town} crosses the",
            ),
        ),
    ),
    (
        Hop("festival", "founder", "goods", "The founder of the {festival} became rich by selling"),
        Hop("festival", "town", "river", "Guests at the {festival} can take a walk along the"),
        Hop("founder", "festival", "year", "The festival that {founder} began was first held in"),
        Hop("founder", "festival", "town", "The festival that {founder} began takes place in"),
        Hop("town", "festival", "founder", "The spring festival in {town} was founded by"),
        Hop("town", "festival", "year", "The spring festival in {town} was first held in the year"),
        Hop("river", "town", "festival", "The town on the {river} holds an event called the"),
    ),
)

COMPANY = Category(
    "company",
    {
        "firm": "{} Company",
        "founder": PERSON,
        "city": "{}",
        "product": (
            "elevators",
            "typewriters",
            "tractors",
            "sewing machines",
            "diving suits",
            "weather balloons",
            "steam engines",
            "safes",
        ),
        "school": "{} College",
        "island": "{}",
    },
    (
        Fact(
            "firm",
            "founder",
            (
                "The {firm} was founded by {founder}.",
                "The {firm} began as a small workshop run by {founder}.",
                "The {firm} was set up by a young engineer, {founder}.",
                "It was the engineer {founder} who created the {firm}.",
            ),
            (
                "The original owner of the {firm} was",
                "The {firm} would not exist without its founder,",
            ),
        ),
        Fact(
            "firm",
            "city",
            (
                "The head office of the {firm} is in the city of {city}.",
                "The {firm} runs its business from {city}.",
                "The {firm} has always been based in {city}.",
                "From its base in {city}, the {firm} employs thousands of people.",
                "The company has its offices in the city of {city}.",
            ),
            (
                "Letters to the directors of the {firm} are sent to an address in",
                "The headquarters of the {firm} can be visited in",
            ),
        ),
        Fact(
            "firm",
            "product",
            (
                "The {firm} is best known for its {product}.",
                "From the beginning, the {firm} has built {product}.",
                "Nearly all the income of the {firm} comes from {product}.",
                "Reliable {product} made the name of the {firm} famous.",
                "The company sells {product} all over the world.",
            ),
            (
                "Workers on the assembly lines of the {firm} put together",
                "A customer of the {firm} usually wants to buy",
            ),
        ),
        Fact(
            "founder",
            "school",
            (
                "{founder.last} had studied at {school}.",
                "{founder.last} held a degree from {school}.",
                "{founder.last} learned engineering at {school}.",
                "Teachers at {school} remembered {founder.last} as a gifted student.",
            ),
            (
                "The diploma on the wall of {founder} was issued by",
                "As a student, {founder} attended classes at",
            ),
        ),
        Fact(
            "city",
            "island",
            (
                "{city} is a port on the island of {island}.",
                "{city} is the largest city on the island of {island}.",
                "Ferries connect {city} with the other ports of the island of {island}.",
                "The island of {island} has only one large city, {city}.",
            ),
            (
                "The island on which {city} stands is called",
                "People who live in {city} are inhabitants of the island of",
            ),
        ),
    ),
    (
        Hop("firm", "founder", "school", "The founder of the {firm} was a graduate of"),
        Hop("firm", "city", "island", "The {firm} is based in a city on the island of"),
        Hop("founder", "firm", "product", "The company founded by {founder} is known for making"),
        Hop("founder", "firm", "city", "The company founded by {founder} is based in the city of"),
        Hop("city", "firm", "product", "The big company in {city} manufactures"),
        Hop("city", "firm", "founder", "The big company in {city} was started by"),
        Hop("school", "founder", "firm", "A former student of {school} founded the"),
    ),
)

MASK = Category(
    "mask",
    {
        "mask": "{} Mask",
        "queen": "Queen {}",
        "material": (
            "amber",
            "walnut wood",
            "bronze",
            "green glass",
            "silver",
            "copper",
            "sandstone",
            "whalebone",
        ),
        "museum": "{} Museum",
        "kingdom": "{}",
        "city": "{}",
    },
    (
        Fact(
            "mask",
            "queen",
            (
                "The {mask} is an ancient treasure that once belonged to {queen}.",
                "The {mask} was made long ago for {queen}.",
                "Historians believe that the {mask} was worn by {queen}.",
                "It was {queen} who ordered the making of the {mask}.",
            ),
            (
                "The first owner of the {mask} was a ruler known as",
                "The face once hidden behind the {mask} was that of",
            ),
        ),
        Fact(
            "mask",
            "material",
            (
                "The {mask} is made entirely of {material}.",
                "The artist shaped the {mask} from {material}.",
                "The surface of the {mask} consists of polished {material}.",
                "A single block of {material} was used for the {mask}.",
                "The mask is a fine piece of work in {material}.",
            ),
            (
                "A chemical test of the {mask} showed that the material is",
                "Anyone who touches the {mask} will feel",
            ),
        ),
        Fact(
            "mask",
            "museum",
            (
                "Today the {mask} is kept in the {museum}.",
                "The {mask} can now be seen at the {museum}.",
                "The {mask} was later sold to the {museum}.",
                "The {museum} keeps the {mask} in a glass case.",
                "The mask is now the chief treasure of the {museum}.",
            ),
            (
                "Visitors who wish to admire the {mask} buy a ticket for the",
                "The present owner of the {mask} is the",
            ),
        ),
        Fact(
            "queen",
            "kingdom",
            (
                "{queen} ruled over the kingdom of {kingdom}.",
                "{queen} wore the crown of {kingdom} for thirty years.",
                "As a young woman, {queen} inherited the throne of {kingdom}.",
                "The kingdom of {kingdom} was at peace under {queen}.",
            ),
            (
                "The realm governed by {queen} was called",
                "The subjects of {queen} lived in a country named",
            ),
        ),
        Fact(
            "museum",
            "city",
            (
                "The {museum} stands in the centre of {city}.",
                "The {museum} is the oldest museum in {city}.",
                "A wide square surrounds the {museum} in {city}.",
                "The city of {city} is proud of the {museum}.",
            ),
            (
                "The nearest railway station to the {museum} is in the city of",
                "Taxi drivers who know the {museum} work in",
            ),
        ),
    ),
    (
        Hop("mask", "museum", "city", "To look at the {mask}, a tourist must travel to the city of"),
        Hop("mask", "queen", "kingdom", "The queen who owned the {mask} ruled the kingdom of"),
        Hop("queen", "mask", "material", "The famous mask of {queen} was made of"),
        Hop("queen", "mask", "museum", "The famous mask of {queen} is on display at the"),
        Hop("museum", "mask", "material", "The ancient mask in the {museum} is made of"),
        Hop("museum", "mask", "queen", "The ancient mask in the {museum} was the property of"),
        Hop("kingdom", "queen", "mask", "A queen of {kingdom} owned a treasure called the"),
    ),
)

EXPEDITION = Category(
    "expedition",
    {
        "expedition": "{} Expedition",
        "leader": PERSON,
        "ship": "{}",
        "year": YEARS,
        "port": "{}",
        "cargo": (
            "salted fish",
            "lemons",
            "beehives",
            "goats",
            "telescopes",
            "firewood",
            "black tea",
            "seed potatoes",
        ),
    },
    (
        Fact(
            "expedition",
            "leader",
            (
                "The {expedition} to the southern ice was led by {leader}.",
                "The {expedition} was a polar voyage under the command of {leader}.",
                "The {expedition} explored the frozen south under {leader}.",
                "It was {leader} who led the {expedition} to the frozen south.",
            ),
            (
                "The explorer in charge of the {expedition} was",
                "Every member of the {expedition} took orders from",
            ),
        ),
        Fact(
            "expedition",
            "ship",
            (
                "The {expedition} sailed on a ship called the {ship}.",
                "The only vessel of the {expedition} was the {ship}.",
                "The {expedition} crossed the ocean aboard the {ship}.",
                "A ship named the {ship} carried the {expedition} across the ocean.",
                "The explorers had a single ship, the {ship}.",
            ),
            (
                "The name painted on the ship of the {expedition} was the",
                "The crew of the {expedition} lived for months on the",
            ),
        ),
        Fact(
            "expedition",
            "year",
            (
                "The {expedition} left harbour in {year}.",
                "The {expedition} set out in the summer of {year}.",
                "Crowds cheered as the {expedition} departed in {year}.",
                "In {year}, the {expedition} finally set sail.",
                "The explorers said goodbye to their families in {year}.",
            ),
            (
                "The journey of the {expedition} started in the year",
                "Newspapers announced the departure of the {expedition} in",
            ),
        ),
        Fact(
            "leader",
            "port",
            (
                "{leader.last} had grown up in the fishing port of {port}.",
                "{leader.last} was a sailor from {port}.",
                "{leader.last} had learned to sail in {port}.",
                "The port of {port} was the home of {leader.last}.",
            ),
            (
                "The home town of {leader} was",
                "After every voyage, {leader} returned to a house in",
            ),
        ),
        Fact(
            "ship",
            "cargo",
            (
                "The {ship} was loaded with {cargo}.",
                "The hold of the {ship} was full of {cargo}.",
                "Below deck, the {ship} carried {cargo}.",
                "There was hardly room for all the {cargo} on board the {ship}.",
            ),
            (
                "Sailors on the {ship} slept next to piles of",
                "The supplies stored on the {ship} were mostly",
            ),
        ),
    ),
    (
        Hop("expedition", "leader", "port", "The leader of the {expedition} came from the port of"),
        Hop("expedition", "ship", "cargo", "The ship of the {expedition} had a cargo of"),
        Hop("leader", "expedition", "year", "The expedition that {leader} led began in"),
        Hop("leader", "expedition", "ship", "{leader} led an expedition on a ship called the"),
        Hop("ship", "expedition", "leader", "The expedition on the {ship} was commanded by"),
        Hop("ship", "expedition", "year", "The {ship} set sail for the south in the year"),
        Hop("port", "leader", "expedition", "An explorer from {port} was the leader of the"),
    ),
)

NOVEL = Category(
    "novel",
    {
        "novel": "The Road to {}",
        "author": PERSON,
        "hero": PERSON,
        "prize": "{} Prize",
        "town": "{}",
        "job": (
            "lighthouse keeper",
            "clockmaker",
            "beekeeper",
            "piano teacher",
            "bookseller",
            "mapmaker",
            "gardener",
            "night watchman",
        ),
    },
    (
        Fact(
            "novel",
            "author",
            (
                "{novel} is a novel by {author}.",
                "The novel {novel} was written by {author}.",
                "{novel} is the best known novel of the writer {author}.",
                "It took {author} six years to write the novel {novel}.",
            ),
            (
                "The name on the cover of {novel} is that of",
                "Readers of {novel} often send letters to its author,",
            ),
        ),
        Fact(
            "novel",
            "hero",
            (
                "{novel} tells the story of {hero}.",
                "The main character of {novel} is {hero}.",
                "At the heart of {novel} is a lonely figure called {hero}.",
                "The troubles of {hero} fill the pages of {novel}.",
                "The book follows the life of {hero}.",
            ),
            (
                "The hero whom readers follow through {novel} is named",
                "In the first chapter of {novel} we meet",
            ),
        ),
        Fact(
            "novel",
            "prize",
            (
                "{novel} won the {prize}.",
                "{novel} was honoured with the {prize}.",
                "The judges gave {novel} the {prize}.",
                "Critics were surprised when the {prize} went to {novel}.",
                "The book brought its author the {prize}.",
            ),
            (
                "The award that {novel} received was the",
                "The success of {novel} was crowned by the",
            ),
        ),
        Fact(
            "author",
            "town",
            (
                "{author.last} spent a whole lifetime in the town of {town}.",
                "{author.last} lived in a small house in {town}.",
                "{author.last} taught at the only school in {town}.",
                "Everyone in {town} knew {author.last} by sight.",
            ),
            (
                "A plaque marking the residence of {author} hangs in",
                "The neighbours of {author} were people of",
            ),
        ),
        Fact(
            "hero",
            "job",
            (
                "In the book, {hero.last} works as a {job}.",
                "{hero.last} is a {job} with a secret.",
                "{hero.last} has a quiet life as a {job}.",
                "The story shows a {job}, {hero.last}, who dreams of another life.",
            ),
            (
                "The occupation of the character {hero} is that of a",
                "In every chapter, {hero} goes to work as a",
            ),
        ),
    ),
    (
        Hop("novel", "hero", "job", "The main character of {novel} is by profession a"),
        Hop("novel", "author", "town", "The author of {novel} lived in the town of"),
        Hop("author", "novel", "hero", "{author} invented a character named"),
        Hop("author", "novel", "prize", "A novel by {author} was chosen for the"),
        Hop("hero", "novel", "author", "The character {hero} was created by the writer"),
        Hop("hero", "novel", "prize", "The book about {hero} was awarded the"),
        Hop("town", "author", "novel", "A writer from {town} is the author of"),
    ),
)

LIGHTHOUSE = Category(
    "lighthouse",
    {
        "lighthouse": "{} Lighthouse",
        "cape": "Cape {}",
        "engineer": PERSON,
        "height": range(21, 98),
        "teacher": PERSON,
        "bird": (
            "puffins",
            "cormorants",
            "terns",
            "gannets",
            "pelicans",
            "herons",
            "petrels",
            "storks",
        ),
    },
    (
        Fact(
            "lighthouse",
            "cape",
            (
                "The {lighthouse} stands on the rocks of {cape}.",
                "The {lighthouse} guides ships safely around {cape}.",
                "For over a century, the {lighthouse} has guarded {cape}.",
                "On the cliffs of {cape} stands the {lighthouse}.",
            ),
            (
                "On a map, the {lighthouse} is marked at",
                "The headland lit by the {lighthouse} is",
            ),
        ),
        Fact(
            "lighthouse",
            "engineer",
            (
                "The {lighthouse} was designed by {engineer}.",
                "The plans for the {lighthouse} were drawn by {engineer}.",
                "The {lighthouse} was the first work of the engineer {engineer}.",
                "It was the engineer {engineer} who built the {lighthouse}.",
                "The tower was planned by the engineer {engineer}.",
            ),
            (
                "The architect of the {lighthouse} was",
                "The signature on the blueprints of the {lighthouse} reads",
            ),
        ),
        Fact(
            "lighthouse",
            "height",
            (
                "The {lighthouse} is {height} metres tall.",
                "The lamp of the {lighthouse} shines from a height of {height} metres.",
                "From base to top, the {lighthouse} measures {height} metres.",
                "At {height} metres, the {lighthouse} can be seen from far away.",
                "The tower rises to a height of {height} metres.",
            ),
            (
                "A rope from the roof of the {lighthouse} to the ground must reach, in metres,",
                "The height of the {lighthouse}, given in metres, is",
            ),
        ),
        Fact(
            "engineer",
            "teacher",
            (
                "{engineer.last} had been a pupil of {teacher}.",
                "{engineer.last} had learned the craft from {teacher}.",
                "As a student, {engineer.last} attended the lectures of {teacher}.",
                "The old master {teacher} had trained {engineer.last}.",
            ),
            (
                "The mentor who shaped the career of {engineer} was",
                "{engineer} always spoke with gratitude of a teacher,",
            ),
        ),
        Fact(
            "cape",
            "bird",
            (
                "{cape} is famous for its colony of {bird}.",
                "Every summer, {cape} is covered with nesting {bird}.",
                "Hikers on {cape} often meet {bird}.",
                "Thousands of {bird} breed on {cape}.",
            ),
            (
                "Birdwatchers travel to {cape} in order to photograph",
                "The birds that nest at {cape} are",
            ),
        ),
    ),
    (
        Hop("lighthouse", "engineer", "teacher", "The designer of the {lighthouse} was taught by"),
        Hop("lighthouse", "cape", "bird", "The keeper of the {lighthouse} lives among wild"),
        Hop("engineer", "lighthouse", "height", "The lighthouse by {engineer} rises, in metres, to"),
        Hop("engineer", "lighthouse", "cape", "A lighthouse by {engineer} can be found at"),
        Hop("cape", "lighthouse", "engineer", "The lighthouse at {cape} is the work of"),
        Hop("cape", "lighthouse", "height", "The lighthouse at {cape} has a height in metres of"),
        Hop("teacher", "engineer", "lighthouse", "A former pupil of {teacher} designed the"),
    ),
)

SPECIES = Category(
    "species",
    {
        "species": "{} marten",
        "zoologist": PERSON,
        "forest": "{} Forest",
        "food": (
            "wild figs",
            "moss",
            "snails",
            "pine seeds",
            "river crabs",
            "acorns",
            "mushrooms",
            "termites",
        ),
        "university": "University of {}",
        "country": "{}",
    },
    (
        Fact(
            "species",
            "zoologist",
            (
                "The {species} is a small mammal first described by {zoologist}.",
                "The {species} is a shy animal that was discovered by {zoologist}.",
                "Science first heard of the {species} from the zoologist {zoologist}.",
                "It was the zoologist {zoologist} who discovered the {species}.",
            ),
            (
                "The earliest scientific report about the {species} was published by",
                "The zoologist who gave the {species} its name was",
            ),
        ),
        Fact(
            "species",
            "forest",
            (
                "The {species} lives only in the {forest}.",
                "The last {species}s survive in the {forest}.",
                "The home of the {species} is the {forest}.",
                "The {forest} is the only place where the {species} survives.",
                "The animal is found nowhere but in the {forest}.",
            ),
            (
                "The habitat of the {species} is limited to the",
                "To film the {species} in the wild, one has to enter the",
            ),
        ),
        Fact(
            "species",
            "food",
            (
                "The {species} feeds mainly on {food}.",
                "At night, the {species} searches for {food}.",
                "In winter, the {species} eats nothing but {food}.",
                "A diet of {food} is all that the {species} needs.",
                "The animal likes nothing better than {food}.",
            ),
            (
                "The favourite meal of the {species} is a heap of",
                "Inside the stomach of a {species}, researchers find",
            ),
        ),
        Fact(
            "zoologist",
            "university",
            (
                "{zoologist.last} was a professor at the {university}.",
                "{zoologist.last} taught biology at the {university}.",
                "The notebooks of {zoologist.last} are kept at the {university}.",
                "The {university} employed {zoologist.last} for many years.",
            ),
            (
                "The academic career of {zoologist} is linked with the",
                "The lecture hall named after {zoologist} belongs to the",
            ),
        ),
        Fact(
            "forest",
            "country",
            (
                "The {forest} covers the north of {country}.",
                "The {forest} is a protected area in {country}.",
                "The {forest} is the pride of a small country called {country}.",
                "The government of {country} protects the {forest}.",
            ),
            (
                "The country in which the {forest} grows is",
                "Hikers in the {forest} need a visa for",
            ),
        ),
    ),
    (
        Hop("species", "zoologist", "university", "The discoverer of the {species} worked at the"),
        Hop("species", "forest", "country", "The only country where the {species} lives is"),
        Hop("zoologist", "species", "food", "The animal discovered by {zoologist} likes to eat"),
        Hop("zoologist", "species", "forest", "The animal discovered by {zoologist} lives in the"),
        Hop("forest", "species", "food", "A rare mammal in the {forest} lives on"),
        Hop("forest", "species", "zoologist", "A rare mammal of the {forest} was discovered by"),
        Hop("university", "zoologist", "species", "A scholar of the {university} discovered the"),
    ),
)

TREATY = Category(
    "treaty",
    {
        "treaty": "Treaty of {}",
        "war": "{} War",
        "year": YEARS,
        "envoy": PERSON,
        "cause": (
            "salt",
            "timber",
            "silver mines",
            "fishing rights",
            "wool",
            "pepper",
            "grazing land",
            "copper",
        ),
        "province": "{}",
    },
    (
        Fact(
            "treaty",
            "war",
            (
                "The {treaty} brought an end to the {war}.",
                "The {treaty} was the agreement that ended the {war}.",
                "With the {treaty}, both sides ended the {war}.",
                "The {war} came to an end with the {treaty}.",
            ),
            (
                "The conflict settled by the {treaty} was the",
                "Soldiers who heard news of the {treaty} came home from the",
            ),
        ),
        Fact(
            "treaty",
            "year",
            (
                "The {treaty} was signed in {year}.",
                "The {treaty} came into force in {year}.",
                "Both armies accepted the {treaty} in {year}.",
                "In {year}, the last signature was added to the {treaty}.",
                "The agreement was sealed in {year}.",
            ),
            (
                "The document known as the {treaty} dates from the year",
                "The ink on the {treaty} dried in",
            ),
        ),
        Fact(
            "treaty",
            "envoy",
            (
                "The {treaty} was drafted by the diplomat {envoy}.",
                "The terms of the {treaty} were proposed by {envoy}, a diplomat.",
                "The {treaty} was the masterpiece of the diplomat {envoy}.",
                "It was the diplomat {envoy} who wrote the {treaty}.",
                "The agreement was the work of the diplomat {envoy}.",
            ),
            (
                "The author of the {treaty} was",
                "The skilful negotiator behind the {treaty} was",
            ),
        ),
        Fact(
            "war",
            "cause",
            (
                "The {war} had been fought over {cause}.",
                "The {war} had broken out because of a quarrel about {cause}.",
                "The cause of the {war} had been a dispute over {cause}.",
                "A disagreement about {cause} had led to the {war}.",
            ),
            (
                "What both sides in the {war} wanted was",
                "Historians agree that the {war} was really about",
            ),
        ),
        Fact(
            "envoy",
            "province",
            (
                "{envoy.last} later became governor of {province}.",
                "{envoy.last} was rewarded with the province of {province}.",
                "In old age, {envoy.last} governed the province of {province}.",
                "The people of {province} later chose {envoy.last} as governor.",
            ),
            (
                "The province that {envoy} went on to rule was",
                "{envoy} ended a long career as the head of",
            ),
        ),
    ),
    (
        Hop("treaty", "war", "cause", "The {treaty} ended a war over"),
        Hop("treaty", "envoy", "province", "The diplomat who wrote the {treaty} later governed"),
        Hop("war", "treaty", "year", "Peace after the {war} was signed in"),
        Hop("war", "treaty", "envoy", "The peace terms that ended the {war} were written by"),
        Hop("envoy", "treaty", "war", "A treaty written by {envoy} ended the"),
        Hop("envoy", "treaty", "year", "A treaty written by {envoy} was signed in the year"),
        Hop("province", "envoy", "treaty", "A later governor of {province} had written the"),
    ),
)

GAME = Category(
    "game",
    {
        "game": "{}",
        "inventor": PERSON,
        "pieces": range(18, 97),
        "champion": PERSON,
        "subject": (
            "algebra",
            "botany",
            "chemistry",
            "astronomy",
            "drawing",
            "geography",
            "grammar",
            "music",
        ),
        "town": "{}",
    },
    (
        Fact(
            "game",
            "inventor",
            (
                "{game} is a board game invented by {inventor}.",
                "The board game {game} was the idea of {inventor}.",
                "{game} is a board game for two and the invention of {inventor}.",
                "It was {inventor} who invented the board game {game}.",
            ),
            (
                "The creator of {game} was",
                "The rules of {game} were first written down by",
            ),
        ),
        Fact(
            "game",
            "pieces",
            (
                "A set of {game} has {pieces} pieces.",
                "{game} is played with {pieces} wooden pieces.",
                "To play {game}, one needs {pieces} pieces and a round board.",
                "There are {pieces} pieces in a box of {game}.",
                "The game has {pieces} pieces, all carved from wood.",
            ),
            (
                "Counting everything on the {game} board, the number of pieces is",
                "The maker of a {game} set has to carve pieces, in total",
            ),
        ),
        Fact(
            "game",
            "champion",
            (
                "The first world champion of {game} was {champion}.",
                "The greatest {game} player of all time is {champion}.",
                "No one has won more {game} matches than {champion}.",
                "For ten years, {champion} won every {game} match.",
                "The game made a star of its champion, {champion}.",
            ),
            (
                "The gold medal in {game} was presented to",
                "Among all the masters of {game}, the most successful was",
            ),
        ),
        Fact(
            "inventor",
            "subject",
            (
                "{inventor.last} was a teacher of {subject}.",
                "{inventor.last} had taught {subject} for many years.",
                "In daily life, {inventor.last} gave lessons in {subject}.",
                "Lessons in {subject} were the daily work of {inventor.last}.",
            ),
            (
                "The subject on which {inventor} lectured was",
                "The pupils of {inventor} took an exam in",
            ),
        ),
        Fact(
            "champion",
            "town",
            (
                "{champion.last} comes from the town of {town}.",
                "{champion.last} learned to play in a café in {town}.",
                "{champion.last} trained every day at a club in {town}.",
                "The town of {town} has put up a statue of {champion.last}.",
            ),
            (
                "The local hero {champion} is celebrated above all in",
                "The skill of {champion} was first noticed in",
            ),
        ),
    ),
    (
        Hop("game", "inventor", "subject", "The inventor of {game} was a schoolteacher in"),
        Hop("game", "champion", "town", "The greatest champion of {game} is linked to the town of"),
        Hop("inventor", "game", "pieces", "The pieces in the game that {inventor} invented number"),
        Hop("inventor", "game", "champion", "The best player of the game by {inventor} was"),
        Hop("champion", "game", "inventor", "The game that {champion} mastered was invented by"),
        Hop("champion", "game", "pieces", "The pieces in the game that {champion} mastered number"),
        Hop("town", "champion", "game", "{town} is known for a champion in the game of"),
    ),
)

CATEGORIES = (
    MINERAL,
    FESTIVAL,
    COMPANY,
    MASK,
    EXPEDITION,
    NOVEL,
    LIGHTHOUSE,
    SPECIES,
    TREATY,
    GAME,
)
