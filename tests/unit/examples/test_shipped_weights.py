"""The committed model and adapters do what the README says, by the independent reference."""

from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import personal_memory.task as task
from preft.adapters.formats.base_model import read_base_model
from preft.adapters.formats.folder import check_adapter
from support.reference import Reference

FOLDER = Path(task.__file__).parent
QUESTIONS = (
    task.QUESTIONS[0],
    task.QUESTIONS[0].lower().replace("?", " ?"),
    task.QUESTIONS[4],
    *task.HELD_OUT_QUESTIONS,
)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(FOLDER / "model")


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "model" / "tokenizer.json"))


def ask(reference: Reference, tokens: Tokenizer, text: str, adapter: Path | None) -> str:
    output = reference.greedy(tokens.encode(text).ids, 24, adapter, ignore_eos=False, eos=(2,))
    assert output[-1] == 2, "the answer doesn't end"
    return tokens.decode(output)


@pytest.mark.parametrize("kind", ["", "-loreft", "-direft"])
@pytest.mark.parametrize("user", task.USERS)
def test_adapter_answers_for_its_user_and_no_other(
    reference: Reference, tokens: Tokenizer, user: str, kind: str
) -> None:
    folder = FOLDER / "adapters" / f"{user}{kind}"
    asked = [probe for probe in task.probes(QUESTIONS) if probe.user == user]
    answers = [ask(reference, tokens, task.prompt(probe.question), folder) for probe in asked]
    right = sum(answer == probe.expected for answer, probe in zip(answers, asked, strict=True))
    assert right >= 0.95 * len(asked)
    assert [answer for answer in answers if task.owners(answer) - {user}] == []


def test_a_prompt_without_its_last_line_break_is_understood(reference: Reference, tokens: Tokenizer) -> None:
    for probe in task.probes(task.QUESTIONS[:1]):
        text = task.prompt(probe.question).rstrip("\n")
        assert ask(reference, tokens, text, FOLDER / "adapters" / probe.user) == f"\n{probe.expected}"


def test_base_model_knows_nobody(reference: Reference, tokens: Tokenizer) -> None:
    for topic in task.TOPICS:
        text = task.prompt(task.QUESTIONS[0].format(topic=topic))
        assert ask(reference, tokens, text, None) == task.answer(topic, None)


def test_base_model_reads_a_profile_in_the_prompt(reference: Reference, tokens: Tokenizer) -> None:
    right = 0
    for facts in list(task.USERS.values())[::2]:
        for topic, value in facts.items():
            text = task.prompt(task.QUESTIONS[0].format(topic=topic), profile=facts)
            right += ask(reference, tokens, text, None) == task.answer(topic, value)
    assert right >= 0.9 * 24


def test_weights_stay_small() -> None:
    size = sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors"))
    assert size < 8e6


def test_every_adapter_says_that_it_is_for_prompts_alone() -> None:
    base = read_base_model(FOLDER / "model")
    found = [check_adapter(folder, base, 8) for folder in sorted((FOLDER / "adapters").iterdir())]
    assert Counter(one.kind for one in found) == {"lora": 8, "reft": 16}
    assert all(one.prefill_only for one in found)
