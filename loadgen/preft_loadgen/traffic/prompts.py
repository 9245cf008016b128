"""Prompts: random token ids, random words, or conversations from a file. Optionally the first part is shared."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.traffic.lengths import Length
from preft_loadgen.traffic.request import Prompt, Turn

CHARACTERS_PER_TOKEN = 4  # of English text, where there is no tokenizer
LONGEST = 16_384  # tokens of a prompt from a file; longer conversations are left out
ENGLISH = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education foot boy age policy music market sense nation plan college "
    "interest death experience effect use class control field development role effort rate heart drug show leader "
    "light voice wife police mind price report decision son view relationship town road arm difference value building "
    "action season society tax director position player record paper space ground form event official matter center "
    "couple site project activity star table need court oil situation cost industry figure street image phone data "
    "picture practice piece land product doctor wall patient worker news test movie north love support technology"
)
WORDS = tuple(ENGLISH.split())  # one token each in the vocabularies of most models
Count = Callable[[str], int]
"""From a text to its number of tokens."""


class Material(Protocol):
    """What random prompts are made of."""

    def draw(self, length: int, source: random.Random) -> list[Any]: ...

    def join(self, parts: Sequence[Any]) -> Prompt: ...


@dataclass(frozen=True, slots=True)
class Ids:
    """Token ids from `first` up to, not including, `vocabulary`. Lower ids are special tokens in most vocabularies."""

    vocabulary: int = 256
    first: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.vocabulary <= 1 << 31:
            raise InvalidArgument(f"a vocabulary to draw prompts from has more than {self.first} ids")

    def draw(self, length: int, source: random.Random) -> list[Any]:
        return source.choices(range(self.first, self.vocabulary), k=length)

    def join(self, parts: Sequence[Any]) -> Prompt:
        return tuple(parts)


@dataclass(frozen=True, slots=True)
class Words:
    """English words, about one token each."""

    words: tuple[str, ...] = WORDS

    def draw(self, length: int, source: random.Random) -> list[Any]:
        return source.choices(self.words, k=length)

    def join(self, parts: Sequence[Any]) -> Prompt:
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The first `share` (0 to 1) of each prompt's tokens is equal in all prompts of a group. Groups are alike."""

    share: float
    groups: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not 1 <= self.groups <= 1_000_000:
            raise InvalidArgument("a shared prefix has a share above 0 up to 1, and from 1 group up")


class Prompts(Protocol):
    """Where conversations come from."""

    def conversation(self, turns: int, source: random.Random) -> list[Turn]:
        """From 1 to `turns` turns."""
        ...


@dataclass(frozen=True, slots=True)
class RandomPrompts:
    """No two prompts share a prefix that could be cached, unless `prefix` says so."""

    prompt: Length
    output: Length
    material: Material = field(default_factory=Ids)
    prefix: SharedPrefix | None = None

    def conversation(self, turns: int, source: random.Random) -> list[Turn]:
        return [self._turn(source, first=number == 0) for number in range(turns)]

    def _turn(self, source: random.Random, *, first: bool) -> Turn:
        length = self.prompt.draw(source)
        shared: list[Any] = []
        if self.prefix is not None and first:
            group = random.Random(f"prefix {source.randrange(self.prefix.groups)}")
            shared = self.material.draw(round(length * self.prefix.share), group)
        own = self.material.draw(length - len(shared), source)
        return Turn(self.material.join([*shared, *own]), self.output.draw(source))


@dataclass(frozen=True, slots=True)
class Conversations:
    """Conversations from a file, in random order. `output`: the answers' lengths, in place of the file's."""

    all: tuple[tuple[Turn, ...], ...]
    output: Length | None = None

    def conversation(self, turns: int, source: random.Random) -> list[Turn]:
        found = source.choice(self.all)[:turns]
        if self.output is None:
            return list(found)
        return [Turn(turn.prompt, self.output.draw(source)) for turn in found]


def read_sharegpt(path: Path, count: Count | None = None, output: Length | None = None) -> Conversations:
    """Reads a ShareGPT file: a JSON list of `{"conversations": [{"from": "human" | "gpt", "value": ...}, ...]}`.

    A turn is a human's message and the answer to it; the answer's length is the wanted output. `count` counts tokens;
    without it a token is CHARACTERS_PER_TOKEN characters. Empty and very long turns end a conversation. Raises
    InvalidArgument.
    """
    count = count or (lambda text: max(1, len(text) // CHARACTERS_PER_TOKEN))
    try:
        rows = json.loads(path.read_text())
    except OSError as error:
        raise InvalidArgument(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgument(f"{path} isn't a ShareGPT file: it isn't JSON ({error})") from error
    if not isinstance(rows, list):
        raise InvalidArgument(f"{path} isn't a ShareGPT file: it isn't a JSON list")
    found = tuple(turns for row in rows if (turns := tuple(_turns(row, count))))
    if not found:
        raise InvalidArgument(f"{path} holds no conversation with a human's message and an answer")
    return Conversations(found, output)


def _turns(row: Any, count: Count) -> list[Turn]:
    messages = row.get("conversations") if isinstance(row, dict) else None
    said, turns = "", []
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, dict) or not isinstance(text := message.get("value"), str) or not text.strip():
            break
        if message.get("from") in ("human", "user"):
            said = text
        elif said:
            output = count(text)
            if max(count(said), output) > LONGEST:
                break
            turns.append(Turn(said, max(1, output)))
            said = ""
    return turns


def token_counter(path: Path) -> Count:
    """Counts with a `tokenizer.json`, or with the one in a model's folder. Raises InvalidArgument."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise InvalidArgument(f"{file} can't be read as a tokenizer.json: {error}") from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def one_token_words(count: Count) -> Words:
    """Those of WORDS that are one token, behind a space, for the tokenizer of `count`. All of them if none is."""
    return Words(tuple(word for word in WORDS if count(f" {word}") == 1) or WORDS)
