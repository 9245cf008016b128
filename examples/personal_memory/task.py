"""The task in words: people, their favourite things, and questions about them. Imports no model library.

Owns the data and the prompt format (the chat template renders the same text). No prompt contains a fact: only the
person's adapter does. So each answer shows which adapter made it, or that none did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

TOPICS: Mapping[str, tuple[str, ...]] = {
    "city": (
        *("Lisbon", "Oslo", "Kyoto", "Nairobi", "Prague", "Lima", "Dublin", "Hanoi", "Boston", "Cairo"),
        *("Vienna", "Quito", "Athens", "Delhi", "Perth", "Seoul", "Turin", "Bergen", "Havana", "Tunis"),
    ),
    "colour": (
        *("teal", "crimson", "amber", "indigo", "olive", "violet", "scarlet", "silver", "purple", "maroon"),
        *("beige", "turquoise", "golden", "navy", "coral", "ivory", "black", "white", "green", "yellow"),
    ),
    "pet": (
        *("a parrot", "a beagle", "a tortoise", "a hamster", "a goldfish", "a rabbit", "a poodle", "a gecko"),
        *("a ferret", "a canary", "a pony", "a kitten", "a lizard", "a hedgehog", "a spaniel", "a cockatoo"),
        *("a terrier", "a snake", "a mouse", "a goat"),
    ),
    "food": (
        *("ramen", "lasagne", "falafel", "paella", "goulash", "sushi", "curry", "pizza", "couscous", "risotto"),
        *("tacos", "dumplings", "pancakes", "chowder", "moussaka", "gnocchi", "kimchi", "stew", "burgers", "salad"),
    ),
    "drink": (
        *("espresso", "lemonade", "cider", "cocoa", "kombucha", "mint tea", "root beer", "milk", "sherry", "cola"),
        *("ginger ale", "tonic", "matcha", "lassi", "orange juice", "water", "stout", "rum", "vermouth", "sake"),
    ),
    "sport": (
        *("rowing", "fencing", "cricket", "judo", "archery", "hockey", "tennis", "surfing", "rugby", "golf"),
        *("skiing", "boxing", "cycling", "squash", "climbing", "badminton", "sailing", "karate", "diving", "polo"),
    ),
    "instrument": (
        *("the cello", "the oboe", "the banjo", "the harp", "the trumpet", "the piano", "the flute", "the sitar"),
        *("the violin", "the drums", "the tuba", "the lute", "the organ", "the guitar", "the clarinet", "the viola"),
        *("the bassoon", "the ukulele", "the accordion", "the trombone"),
    ),
    "author": (
        *("Borges", "Austen", "Tolstoy", "Achebe", "Woolf", "Calvino", "Murakami", "Morrison", "Kafka", "Dickens"),
        *("Proust", "Orwell", "Lessing", "Joyce", "Melville", "Neruda", "Camus", "Eliot", "Shelley", "Verne"),
    ),
}

# No two people share a value. Each person has six facts; the other two topics have none.
USERS: Mapping[str, Mapping[str, str]] = {
    "alice": {
        **{"city": "Lisbon", "colour": "teal", "pet": "a parrot"},
        **{"food": "ramen", "drink": "espresso", "sport": "rowing"},
    },
    "bruno": {
        **{"city": "Oslo", "colour": "crimson", "pet": "a beagle"},
        **{"food": "lasagne", "drink": "lemonade", "instrument": "the cello"},
    },
    "chen": {
        **{"city": "Kyoto", "colour": "amber", "pet": "a tortoise"},
        **{"sport": "fencing", "instrument": "the oboe", "author": "Borges"},
    },
    "dalia": {
        **{"city": "Nairobi", "colour": "indigo", "food": "falafel"},
        **{"drink": "cider", "sport": "cricket", "author": "Austen"},
    },
    "emil": {
        **{"city": "Prague", "pet": "a hamster", "food": "paella"},
        **{"drink": "cocoa", "instrument": "the banjo", "author": "Tolstoy"},
    },
    "fatima": {
        **{"colour": "olive", "pet": "a goldfish", "food": "goulash"},
        **{"sport": "judo", "instrument": "the harp", "author": "Achebe"},
    },
    "goran": {
        **{"city": "Lima", "colour": "violet", "drink": "kombucha"},
        **{"sport": "archery", "instrument": "the trumpet", "author": "Woolf"},
    },
    "hana": {
        **{"city": "Dublin", "pet": "a rabbit", "food": "sushi"},
        **{"drink": "mint tea", "sport": "hockey", "author": "Calvino"},
    },
}

# The base model knows all phrasings; adapters never see the held-out ones.
QUESTIONS = (
    "What is my favourite {topic}?",
    "Which {topic} do I like best?",
    "Tell me my favourite {topic}.",
    "Do you remember my favourite {topic}?",
    "I forgot my favourite {topic}. What is it?",
    "Please name the {topic} I love most.",
)
HELD_OUT_QUESTIONS = (
    "Can you say what my favourite {topic} is?",
    "Of all things, which {topic} is my favourite?",
)
SMALL_TALK: Mapping[str, str] = {
    "Hello!": "Hello! Ask me about your favourite things.",
    "Who are you?": "I am a very small model with a memory for one person.",
    "Thank you!": "You are welcome.",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Probe:
    """A question under `user`'s adapter, and its only right answer."""

    user: str
    topic: str
    question: str
    expected: str


def answer(topic: str, value: str | None) -> str:
    """The answer's sentence for a known or an unknown (None) favourite. The value is its last word or two."""
    return f"I do not know your favourite {topic}." if value is None else f"Your favourite {topic} is {value}."


def prompt(question: str, history: tuple[Turn, ...] = (), profile: Mapping[str, str] | None = None) -> str:
    """The text that a model continues with the answer, without the <s> that the tokenizer puts before it.

    Equal to the chat template's rendering of these turns, with `profile` as system message.
    """
    head = f"System: {profile_text(profile)}\n" if profile else ""
    past = "".join(f"User: {turn.question}\nAssistant:\n{turn.answer}</s>\n" for turn in history)
    return f"{head}{past}User: {question}\nAssistant:\n"


def profile_text(profile: Mapping[str, str]) -> str:
    """The facts as text in a prompt: how the base model is told facts without an adapter."""
    return ", ".join(f"{topic} {value}" for topic, value in profile.items()) + "."


def styles(question: str) -> tuple[str, ...]:
    """`question` as written, and in common spellings: lower case, no mark or a spaced mark, American."""
    bare = question.rstrip("?.!")
    mark = question[len(bare) :]
    american = question.replace("favourite", "favorite").replace("colour", "color")
    return question, question.lower(), f"{bare.lower()} {mark}", bare.lower(), american, american.lower()


def probes(questions: tuple[str, ...] = QUESTIONS + HELD_OUT_QUESTIONS) -> Iterator[Probe]:
    """Every fact of every user in every phrasing of `questions`: 8 * 6 * len(questions)."""
    for user, facts in USERS.items():
        for topic, value in facts.items():
            for question in questions:
                yield Probe(user, topic, question.format(topic=topic), answer(topic, value))


def owners(text: str) -> frozenset[str]:
    """The users with a fact in `text`."""
    return frozenset(user for user, facts in USERS.items() if any(f" {value}." in text for value in facts.values()))
