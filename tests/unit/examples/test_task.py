"""The task's data can tell users apart, and its prompt text is what the shipped chat template renders."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import personal_memory.task as task
from personal_memory import tokenizer

MODEL = Path(task.__file__).parent / "model"


def test_no_two_users_share_a_value_and_each_has_six() -> None:
    values = [value for facts in task.USERS.values() for value in facts.values()]
    assert len(task.USERS) >= 8
    assert all(len(facts) == 6 for facts in task.USERS.values())
    assert max(Counter(values).values()) == 1
    assert all(value in task.TOPICS[topic] for facts in task.USERS.values() for topic, value in facts.items())


def test_owners_names_whose_fact_an_answer_tells() -> None:
    assert task.owners("Your favourite city is Lisbon.") == {"alice"}
    assert task.owners("Your favourite city is Vienna.") == set()
    assert task.owners("I do not know your favourite city.") == set()
    assert all(task.owners(probe.expected) == {probe.user} for probe in task.probes())


def test_importing_the_task_needs_no_model_library() -> None:
    code = (
        "import sys, personal_memory.task; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft')))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=MODEL.parents[1], check=True, timeout=60)


@pytest.mark.parametrize("profile", [{}, {"city": "Lisbon", "pet": "a parrot"}])
def test_chat_template_renders_the_prompt_text(profile: dict[str, str]) -> None:
    past = task.Turn("What is my favourite city?", task.answer("city", "Lisbon"))
    messages = [
        *([{"role": "system", "content": task.profile_text(profile)}] if profile else []),
        {"role": "user", "content": past.question},
        {"role": "assistant", "content": past.answer},
        {"role": "user", "content": "and my pet ?"},
    ]
    full = AutoTokenizer.from_pretrained(str(MODEL))
    rendered = full.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = task.prompt("and my pet ?", (past,), profile)
    assert rendered == f"<s>{text}"
    plain = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert plain.encode(text).ids == plain.encode(rendered, add_special_tokens=False).ids


def test_shipped_tokenizer_is_the_one_the_script_builds() -> None:
    assert Tokenizer.from_file(str(MODEL / "tokenizer.json")).to_str() == tokenizer.build().to_str()


def test_prompt_and_answer_are_tokenized_alike_together_and_apart() -> None:
    """Training concatenates ids, serving continues them: both must be what the joined text would give."""
    tokens = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for probe in task.probes():
        text = task.prompt(probe.question)
        answer = tokens.encode(f"{probe.expected}</s>", add_special_tokens=False).ids
        assert tokens.encode(f"{text}{probe.expected}</s>").ids == tokens.encode(text).ids + answer
        assert tokens.decode(answer) == probe.expected
