"""Prompts and texts are those of transformers, for many chat templates and every family of tokenizers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.messages import Message
from preft.gateway.text.chat_prompt import ChatPrompt
from preft.gateway.text.detokenizer import Detokenizer
from preft.gateway.text.tokenizer import Tokenizer
from support.tokenizer_families import FAMILIES

DATA = Path(__file__).parents[3] / "data" / "chat_templates"
TEMPLATES = {path.stem: path.read_text() for path in sorted(DATA.glob("*.jinja"))}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

USER = {"role": "user", "content": " Hello world! <|im_start|> naïve 你好 🙂 \n"}
SYSTEM = {"role": "system", "content": "Be brief. The weather in Bonn"}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nI'm fine: 12345 times."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "the quick"}, {"type": "text", "text": " brown fox"}]}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": 3}},
}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the <weather>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "a city"}}},
    },
}
TALKS = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ASSISTANT, USER],
    "system and turns": [SYSTEM, USER, ASSISTANT, USER],
}


@dataclass(frozen=True)
class Family:
    ours: Tokenizer
    theirs: Any


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    folders = {name: write(tmp_path_factory.mktemp(name)) for name, write in FAMILIES.items()}
    return {
        name: Family(Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)) for name, folder in folders.items()
    }


@pytest.fixture(scope="module")
def prompts() -> dict[str, ChatPrompt]:
    return {name: ChatPrompt({"default": source}, SPECIAL) for name, source in TEMPLATES.items()}


def test_there_are_enough_of_both():
    assert len(TEMPLATES) >= 30
    assert len(FAMILIES) >= 5


def theirs(source: str, talk: list[dict[str, Any]], family: Family, **options: Any) -> tuple[str, list[int]] | None:
    """Text and ids by transformers, None if the template refuses. Strings are wrapped where it takes nothing else."""
    options = {"chat_template": source, **SPECIAL, "add_generation_prompt": True, **options}
    try:
        text = family.theirs.apply_chat_template(talk, tokenize=False, **options)
        ids = family.theirs.apply_chat_template(talk, tokenize=True, return_dict=False, **options)
    except Exception:  # whatever the template meets
        return None
    return text, ids


async def agree(prompt: ChatPrompt, source: str, talk: list[dict[str, Any]], family: Family, **options: Any) -> bool:
    """Whether both render the talk; if only one does, or if they differ, the test fails."""
    wanted = theirs(source, talk, family, **options)
    try:
        text = prompt.render([Message.model_validate(message) for message in talk], **options)
    except InvalidRequest:
        assert wanted is None
        return False
    [ids] = await family.ours.encode([text], add_special_tokens=False)
    assert wanted == (text, list(ids))
    return True


PARTS_ONLY = ("idefics3", "smolvlm")  # their content is a list


@pytest.mark.parametrize("family", FAMILIES)
async def test_prompts_are_those_of_transformers(families, prompts, family):
    rendered = 0
    for name, source in TEMPLATES.items():
        for talk in TALKS.values():
            if name in PARTS_ONLY:
                talk = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
            rendered += await agree(prompts[name], source, talk, families[family])
    assert rendered > 120


@pytest.mark.parametrize("name", PARTS_ONLY)
def test_texts_are_parts_where_the_template_takes_nothing_else(prompts, name):
    plain = [Message.model_validate(message) for message in TALKS["system and turns"]]
    parts = [
        Message(role=m.role, content=[{"type": "text", "text": m.content.texts[0]}])  # type: ignore[arg-type]
        for m in plain
    ]
    assert prompts[name].render(plain) == prompts[name].render(parts)
    assert "Be brief. The weather in Bonn" in prompts[name].render(plain)


TAKE_PARTS = ("gemma3", "glm4moe", "idefics3", "llama3_2_vision", "mistral_v7", "smolvlm")


@pytest.mark.parametrize("name", TEMPLATES)
async def test_parts_arrive_as_parts_or_joined_by_newlines(families, prompts, name):
    if name in TAKE_PARTS:
        assert await agree(prompts[name], TEMPLATES[name], [PARTS], families["llama3"])
    else:
        joined = [{"role": "user", "content": "the quick\n brown fox"}]
        wanted, _ = theirs(TEMPLATES[name], joined, families["llama3"]) or ("", [])
        assert prompts[name].render([Message.model_validate(PARTS)]) == wanted


CALL_TOOLS = (
    "glm4moe", "gptoss", "granite_tools", "hermes_tools", "llama3_1_tools", "mistral_v3_tools", "qwen2_5", "qwen3",
    "qwen3_instruct_2507",
)  # fmt: skip


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", CALL_TOOLS)
async def test_tool_calls_and_their_results(families, prompts, name, tools):
    prompt, source, family = prompts[name], TEMPLATES[name], families["llama3"]
    if tools:
        assert await agree(prompt, source, [USER], family, tools=tools)
    for talk in ([USER, CALLING, RESULT], [USER, CALLING, RESULT, {"role": "assistant", "content": "It is"}, USER]):
        assert await agree(prompt, source, talk, family, tools=tools)
    as_text = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}  # type: ignore[dict-item]
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [as_text]}, RESULT]
    rendered = prompt.render([Message.model_validate(message) for message in history], tools=tools)
    assert rendered == prompt.render([Message.model_validate(m) for m in (USER, CALLING, RESULT)], tools=tools)


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
async def test_templates_that_want_arguments_as_text_and_no_content(families, prompts, name):
    as_text = {**CALL, "function": {"name": "weather", "arguments": '{"city":  "Köln"}'}}
    talk = [USER, {"role": "assistant", "content": None, "tool_calls": [as_text]}, RESULT]
    wanted, _ = theirs(TEMPLATES[name], talk, families["llama3"]) or ("", [])
    assert '{"city":  "Köln"}' in wanted
    rendered = prompts[name].render([Message.model_validate(message) for message in talk])
    assert rendered == wanted


@pytest.mark.parametrize("name", TEMPLATES)
async def test_a_final_message_is_continued(families, prompts, name):
    final = {"role": "assistant", "content": "It is "}
    talk = [USER, final]
    if name in PARTS_ONLY:
        talk = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert await agree(prompts[name], TEMPLATES[name], talk, families["llama3"], **options)


@pytest.mark.parametrize("name", ["granite_tools", "qwen3", "smollm3", "llama3_1_tools"])
async def test_variables_and_documents(families, prompts, name):
    prompt, source, family = prompts[name], TEMPLATES[name], families["llama3"]
    variables = {"enable_thinking": False, "date_string": "1 May 2026", "controls": {"length": "short"}}
    wanted, _ = theirs(source, [USER], family, **variables) or ("", [])
    assert prompt.render([Message.model_validate(USER)], variables=variables) == wanted
    if name == "granite_tools":
        assert await agree(prompt, source, [USER], family, documents=[{"title": "t", "text": "a <fact>"}])


relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
texts = st.text(alphabet="helo wrd.,!?'\n你好🙂привéñ a<|>", max_size=40) | st.sampled_from(
    [
        "a <|im_start|> b", "x <|eot_id|> y", "<tool_call> z", " a  <tool_call>", "<image>a</s> <s>", "<think>  x",
        "Hello world! It's <|im_end|>", "<0x41>", "e\u0301 \u1e9b\u0323", "don't 'x' . , n't",
    ]
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@relaxed
@given(text=texts)
def test_ids_and_texts_are_those_of_transformers(families, family, text):
    ours, theirs = families[family].ours, families[family].theirs
    for add in (True, False):
        wanted = theirs(text, add_special_tokens=add)["input_ids"]
        assert list(ours._backend.encode(text, add_special_tokens=add).ids) == wanted
        for skip in (True, False):
            decoded = theirs.decode(wanted, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(wanted, skip_special_tokens=skip) == decoded
            streamed = Detokenizer(ours, [], skip_special_tokens=skip)
            assert "".join(streamed.push([token]) for token in wanted) + streamed.flush() == decoded
