"""Forms of output: what compiles, which tokens fit, and how a form ends or fails."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from transformers import AutoTokenizer

from preft.core.errors import InvalidRequest
from preft.core.structured import StructuredOutputs
from preft.engine.grammar import FormChecks, Grammars, OutputGrammar
from preft.gateway.bodies.messages import Tool
from preft.gateway.bodies.tool_choice import NamedTool, ToolChoice, forced_form
from preft.gateway.calls_or_form import calls_or_form
from preft.gateway.text.choice_reader import joined_calls
from preft.gateway.text.forced_calls import CallArray, ForcedCalls, NamedCall
from preft.gateway.text.parsing import CallTag
from preft.gateway.text.tagged_calls import TaggedCalls
from support.json_schemas import random_schema
from support.models import EOS, make_model
from support.parser_tokenizer import parser_model
from support.small_tokenizers import word_level

VOCABULARY = 512
STOP = 300  # an ordinary token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("grammar") / "model")


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    return Grammars(str(folder), VOCABULARY)


@pytest.fixture(scope="module")
def checks(folder: Path) -> Iterator[FormChecks]:
    checks = FormChecks(str(folder), VOCABULARY)
    yield checks
    checks.close()


@pytest.fixture(scope="module")
def encode(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def grammar_of(grammars: Grammars, output: list[int] | None = None, min_tokens: int = 0, **form: Any) -> OutputGrammar:
    return grammars.compiled(StructuredOutputs(**form), [STOP, EOS], min_tokens, output or []).result()


def allowed(grammars: Grammars, grammar: OutputGrammar) -> set[int]:
    mask = grammars.allocate_token_bitmask(2)
    mask.random_()  # nothing of the last step's mask may remain
    other = mask[0].clone()
    grammar.fill_bitmask(mask, 1)
    assert (mask[0] == other).all()
    return set(np.flatnonzero(np.unpackbits(mask[1].numpy().view(np.uint8), bitorder="little")).tolist())


def fits(grammars: Grammars, encode: Any, text: str, **form: Any) -> bool:
    grammar = grammar_of(grammars, **form)
    return grammar.accept_tokens("", [*encode(text), EOS])


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"regex": "ab{2,3}"}, "abb", "ab"),
        ({"choice": ("yes", 'n"o\n')}, 'n"o\n', "no"),
        ({"grammar": 'root ::= "x" [0-9]+'}, "x12", "x"),
        ({"grammar": 'start: "x" /[0-9]+/'}, "x12", "x"),
        ({"json_object": True}, '{"a": [1]}', "[1]"),
        ({"json": "true"}, "[1]", "]"),
        ({"json": '{"enum": ["a", 1]}'}, "1", '"b"'),
        ({"json": '{"type": "string", "maxLength": 2}'}, '"🙂é"', '"abc"'),
        ({"json": '{"type": "array", "items": {"type": "integer"}}'}, "[1, 2]", '["a"]'),
        ({"json": '{"type": "array", "items": {}}', "disable_any_whitespace": True}, "[1,2]", "[1, 2]"),
        ({"json": '{"type": "array", "items": {}}', "whitespace_pattern": "-?"}, "[1,-2]", "[1, 2]"),
        ({"json": '{"properties": {"a": {}}}'}, '{"b": 1}', "{b}"),
        ({"json": '{"properties": {"a": {}}}', "disable_additional_properties": True}, '{"a": 1}', '{"b": 1}'),
        (
            {
                "structural_tag": '{"structures": [{"begin": "@f(", "schema": {"type": "integer"}, "end": ")"}],'
                ' "triggers": ["@f"]}'
            },
            "free text @f(12) more",
            "free @f(x)",
        ),
    ],
)
async def test_forms(
    checks: FormChecks, grammars: Grammars, encode: Any, form: dict[str, Any], good: str, bad: str
) -> None:
    await checks.check(StructuredOutputs(**form))
    assert fits(grammars, encode, good, **form)
    assert not fits(grammars, encode, bad, **form)


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "("},
        {"regex": "a(?=b)"},
        {"grammar": "root ::= ("},
        {"grammar": "start: undefined"},
        {"json": '{"type": "text"}'},
        {"json": '{"$ref": "#/$defs/none"}'},
        {"json": '{"$ref": "https://example.com/schema"}'},
        {"json": '{"type": "string", "not": {"const": "a"}}'},
        {"json": '{"type": "array", "uniqueItems": true}'},
        {"json": '{"type": "object", "dependentRequired": {"a": ["b"]}}'},
        {"json": '{"oneOf": [{"type": "integer"}, {"type": "number"}]}'},
        {"json": '{"type": "string", "format": "colour"}'},
        {"json": '{"not": {}, "x-guidance": {"lenient": true}}'},
        {"json": '{"type": "string", "minLength": 3, "maxLength": 1}'},
        {"json": "false"},
        {"json": "{}", "whitespace_pattern": "("},
        {"structural_tag": "{}"},
        {"structural_tag": '{"structures": [{"begin": "a", "schema": {}, "end": "b"}], "triggers": ["c"]}'},
        {"structural_tag": '{"structures": 1, "triggers": []}'},
    ],
)
async def test_what_cannot_be_kept_is_refused(checks: FormChecks, form: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await checks.check(StructuredOutputs(**form))
    assert caught.value.param == "structured_outputs"
    assert str(caught.value)


async def test_forms_are_checked_in_a_process_with_many_open_files(folder: Path) -> None:
    """A server with thousands of streams has file descriptors above 1023, which select() doesn't take."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        for _ in range(1100):
            stack.callback(os.close, os.dup(1))
        checks = FormChecks(str(folder), VOCABULARY)
        stack.callback(checks.close)
        await checks.check(StructuredOutputs(regex="a{2}many"))
        with pytest.raises(InvalidRequest):
            await checks.check(StructuredOutputs(regex="("))


def _chain(rules: int, suffix: str = "") -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}{suffix}" for i in range(rules)) + f'\nr{rules}: "a"'


BOMBS: dict[str, dict[str, Any]] = {
    "repetition": {"regex": "(((a{0,1000}){0,1000}){0,1000}){0,1000}"},
    "backtracking": {"regex": "(a|b)*a(a|b){30}"},
    "parentheses": {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "rules": {"grammar": _chain(3500)},
    "empty rules": {"grammar": _chain(2500, " |")},
    "ambiguous": {"grammar": 'start: s\ns: s s s | s s | "a" | "b" |'},
    "doubling": {"grammar": "start: X0\n" + "\n".join(f"X{i}: X{i + 1} X{i + 1}" for i in range(30)) + '\nX30: "a"'},
    "alternatives": {"grammar": "start: (" + "|".join(f"/(a|b)*a(a|b){{{i % 30}}}/" for i in range(1500)) + ")*"},
    "all at once": {
        "grammar": "start: X\nX: " + " & ".join(f"/(.|\\n)*{a}{b}c(.|\\n)*/" for a in "abcdefg" for b in "hijk")
    },
    "many items": {"json": '{"type": "array", "minItems": 1000000000}'},
    "items": {"json": '{"type": "array", "items": {"type": "array", "minItems": 4000}, "minItems": 4000}'},
    "string": {"json": '{"type": "string", "minLength": 1000000000}'},
    "keys": {"json": json.dumps({"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(2000)}})},
    "references": {
        "json": json.dumps(
            {
                "$ref": "#/$defs/d24",
                "$defs": {
                    "d0": {},
                    **{
                        f"d{i}": {"allOf": [{"properties": {k: {"$ref": f"#/$defs/d{i - 1}"}}} for k in "ab"]}
                        for i in range(1, 25)
                    },
                },
            }
        )
    },
    "all of": {"json": json.dumps({"allOf": [{"pattern": f"^(.*{a}{b}.*x.*)$"} for a in "abcdef" for b in "ghi"]})},
    "multiples": {"json": '{"allOf": [{"multipleOf": 1009}, {"multipleOf": 1013}, {"multipleOf": 1019}]}'},
}


@pytest.mark.parametrize("name", BOMBS)
async def test_bombs_are_refused_or_their_steps_are_short(checks: FormChecks, grammars: Grammars, name: str) -> None:
    wanted = StructuredOutputs(**BOMBS[name])
    try:
        await checks.check(wanted)
    except InvalidRequest:
        await checks.check(StructuredOutputs(regex="ab"))  # others go on
        return
    grammar = grammar_of(grammars, **BOMBS[name])
    draw = random.Random(0)
    for _ in range(200):
        start = time.thread_time()
        tokens = sorted(allowed(grammars, grammar) - {EOS, STOP}) or [EOS]
        accepted = grammar.accept_tokens("", [draw.choice(tokens)])
        assert time.thread_time() - start < 0.5  # fifty times what was measured
        if not accepted:
            assert grammar.error
            return


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"regex": "a", "choice": ("b",)},
        {"regex": "a" * 70_000},
        {"choice": ("a" * 40_000, "b" * 40_000)},
        {"json": "{"},
        {"json": "3"},
        {"json": "[" * 100_000},
        {"json": "[" * 200 + "]" * 200},
        {"json": '{"a":' * 70 + "1" + "}" * 70},
        {"structural_tag": "[]"},
        {"grammar": " "},
        {"json": "{}", "whitespace_pattern": " ", "disable_any_whitespace": True},
    ],
)
def test_limits_without_a_compiler(form: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        StructuredOutputs(**form)


@pytest.mark.parametrize("seed", range(40))
def test_every_walk_ends_in_a_valid_document(grammars: Grammars, folder: Path, seed: int) -> None:

    draw = random.Random(seed)
    schema = random_schema(draw)
    grammar = grammar_of(grammars, json=json.dumps(schema), disable_any_whitespace=True)
    output: list[int] = []
    while not output or output[-1] != EOS:
        output.append(draw.choice(sorted(allowed(grammars, grammar) - {STOP} or {EOS})))
        assert grammar.accept_tokens("", output[-1:]), grammar.error
    text = AutoTokenizer.from_pretrained(str(folder)).decode(output[:-1])
    jsonschema.validate(json.loads(text), schema)
    # Behind any tokens so far, another grammar allows the same as this one did.
    cut = draw.randrange(len(output))
    first = grammar_of(grammars, output[:cut], json=json.dumps(schema), disable_any_whitespace=True)
    second = grammar_of(grammars, json=json.dumps(schema), disable_any_whitespace=True)
    for token in output[:cut]:
        allowed(grammars, second)
        assert second.accept_tokens("", [token])
    assert allowed(grammars, first) == allowed(grammars, second)


def test_tokens_so_far_that_do_not_fit(grammars: Grammars, encode: Any) -> None:
    for wrong in ([*encode("a"), EOS], encode("b"), [*encode("ab"), EOS, *encode("b")]):
        with pytest.raises(ValueError, match="the tokens so far don't fit"):
            grammar_of(grammars, wrong, regex="ab+")


def test_ends_come_at_the_end_alone_and_nothing_comes_after_it(grammars: Grammars, encode: Any) -> None:
    grammar = grammar_of(grammars, regex="ab?")
    assert not allowed(grammars, grammar) & {EOS, STOP}
    assert grammar.accept_tokens("", encode("a"))
    assert allowed(grammars, grammar) == {EOS, STOP, *encode("b")}
    assert grammar.accept_tokens("", [EOS])
    assert allowed(grammars, grammar) == {EOS, STOP}
    assert grammar.accept_tokens("", [EOS])  # `ignore_eos`
    assert not grammar.is_terminated()
    assert not grammar.accept_tokens("", encode("b"))


def test_min_tokens_behind_the_end(grammars: Grammars, encode: Any) -> None:
    grammar = grammar_of(grammars, min_tokens=3, regex="ab")
    assert grammar.accept_tokens("", encode("ab")[:2])
    allowed(grammars, grammar)
    assert "min_tokens is 3" in grammar.error
    assert not grammar.accept_tokens("", [EOS])


async def test_a_tokenizer_that_cannot_be_used(tmp_path: Path) -> None:
    checks = FormChecks(str(tmp_path), 9)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="tokenizer can't be used"):
            await checks.check(StructuredOutputs(regex="a"))
    checks.close()


async def test_no_token_of_the_vocabulary_fits(tmp_path: Path) -> None:
    checks = FormChecks(str(word_level(tmp_path / "words")), 9)
    with pytest.raises(InvalidRequest):
        await checks.check(StructuredOutputs(regex="[xyz]{3}"))
    checks.close()


def test_a_form_begins_behind_a_token_and_no_end_comes_before(grammars: Grammars, encode: Any) -> None:
    wanted: dict[str, Any] = {"choice": ("ab", "ba"), "begins_after": 77}
    grammar = grammar_of(grammars, **wanted)
    everything = set(range(VOCABULARY)) - {STOP, EOS}
    assert allowed(grammars, grammar) & set(range(VOCABULARY)) == everything
    assert grammar.accept_tokens("", [5, 6])
    assert allowed(grammars, grammar) & set(range(VOCABULARY)) == everything
    assert grammar.accept_tokens("", [77])
    begun = allowed(grammars, grammar)
    assert begun == allowed(grammars, grammar_of(grammars, choice=("ab", "ba")))
    text = encode("ab")
    assert grammar.accept_tokens("", [*text, EOS])
    continued = grammar_of(grammars, [5, 6, 77, *text[:1]], **wanted)
    assert allowed(grammars, continued) == allowed(grammars, grammar_of(grammars, text[:1], choice=("ab", "ba")))
    for tokens in ([5, EOS], [5, STOP], [5, 77, EOS], [77, *encode("x")]):
        assert not grammar_of(grammars, **wanted).accept_tokens("", tokens)


def test_forced_calls_end_and_fit_whatever_tokens_are_drawn(folder: Path, grammars: Grammars) -> None:
    level = {"$defs": {"level": {"enum": ["low", "high"]}}}
    paint = {"type": "object", "properties": {"level": {"$ref": "#/$defs/level"}}, "required": ["level"], **level}
    wait = {"type": "object", "properties": {"hours": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}}
    wait |= {"required": ["hours"], "additionalProperties": False}
    parameters = {"paint": {**paint, "additionalProperties": False}, "wait": wait}
    tools = [
        Tool.model_validate({"function": {"name": name, "parameters": schema}}) for name, schema in parameters.items()
    ]
    tokenizer, draw = AutoTokenizer.from_pretrained(str(folder)), random.Random(3)
    called = set()
    choices: list[ToolChoice] = ["required", NamedTool("paint"), NamedTool("wait")]
    for choice in choices * 5:
        form = forced_form(tools, choice, parallel=False)
        assert form is not None
        grammar, output = grammars.compiled(form, [EOS], 0, []).result(), list[int]()
        while not output or output[-1] != EOS:
            output.append(draw.choice(sorted(allowed(grammars, grammar) & set(range(VOCABULARY)))))
            assert grammar.accept_tokens("", output[-1:])
            assert len(output) < 150
        found: ForcedCalls = CallArray(lambda name, position: "id")
        if isinstance(choice, NamedTool):
            found = NamedCall(choice.name, lambda name, position: "id")
        parts = found.push(tokenizer.decode(output[:-1]), finished=True)
        [call] = joined_calls(list(parts.tool_calls))
        assert parts.content == ""
        jsonschema.validate(json.loads(call.arguments), parameters[call.name])
        called.add(call.name)
    assert called == {"paint", "wait"}


PAINT = {"type": "object", "properties": {"level": {"$ref": "#/$defs/level"}}, "required": ["level"]}
PAINT |= {"additionalProperties": False, "$defs": {"level": {"enum": ["low", "high"]}}}
WAIT = {"type": "object", "properties": {"hours": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}}}
WAIT |= {"required": ["hours"], "additionalProperties": False}
ANSWER = {"type": "object", "properties": {"name": {"enum": ["paint", "x"]}, "ok": {"type": "boolean"}}}
ANSWER |= {"required": ["name", "ok"], "additionalProperties": False}
SCHEMAS = {"paint": PAINT, "wait": WAIT}
MARKED_TAGS = [
    CallTag(name, f'<tool_call>{line}{{"name": "{name}", "arguments": ', schema, f"}}{line}</tool_call>")
    for name, schema in SCHEMAS.items()
    for line in ("\n", "")
]
TAGS = {
    "marked": MARKED_TAGS,
    "plain": [CallTag(name, f'{{"name": "{name}", "parameters": ', schema, "}") for name, schema in SCHEMAS.items()],
}


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Grammars, Any]:
    """A tokenizer that has the marks of calls as tokens."""
    folder = parser_model(tmp_path_factory.mktemp("marks") / "model")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return Grammars(str(folder), len(tokenizer)), tokenizer


def beside_calls(tags: list[CallTag], parallel: bool = True, **form: Any) -> StructuredOutputs:
    return calls_or_form(tags, StructuredOutputs(**form), "response_format", parallel=parallel)


CALL = '<tool_call>\n{"name": "paint", "arguments": {"level": "low"}}\n</tool_call>'
OTHER_CALL = '<tool_call>{"name": "wait", "arguments": {"hours":[true]}}</tool_call>'
PLAIN_CALL = '{"name": "paint", "parameters": {"level": "low"}}'
BESIDE: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "marked",
        {"json": json.dumps(ANSWER)},
        [
            CALL,
            OTHER_CALL,
            CALL + OTHER_CALL,
            f"{CALL}\n{CALL}",
            '{"name": "x", "ok": true}',
            '{"name":"paint","ok":false}',
        ],
        [
            CALL[:-1],
            CALL + '{"name": "x", "ok": true}',
            f"hm {CALL}",
            CALL.replace("low", "lower"),
            CALL.replace("paint", "wait"),
            '{"ok": true}',
            "",
        ],
    ),
    ("marked", {"regex": "(.|\n)*"}, [CALL, "a/b\n<tool", "", "<tool_x"], [CALL + "x", CALL[:-1]]),
    ("marked", {"regex": "[a-z/]+[^x]"}, [CALL, "a/b\u00e9"], ["a/bx", "7"]),
    ("marked", {"choice": ("yes", "yes \U0001f642")}, [OTHER_CALL, "yes", "yes \U0001f642"], ["yes ", "no"]),
    ("marked", {"json_object": True}, [CALL, '{"a": "<tool"}'], ["[]"]),
    (
        "plain",
        {"json": json.dumps(ANSWER)},
        [
            PLAIN_CALL,
            f"{PLAIN_CALL}; {PLAIN_CALL}",
            '{"name":"wait","parameters":{"hours":[]}}',
            '{"name": "paint", "ok": true}',
        ],
        ['{"name": "paint", "parameters": {}}', '{"name": "x", "parameters": {"level": "low"}}', '{"name": "paint"}'],
    ),
    ("plain", {"choice": ("yes", "no")}, [PLAIN_CALL, "no"], ["{}"]),
]


@pytest.mark.parametrize(("kind", "form", "good", "bad"), BESIDE)
@pytest.mark.parametrize("has_marks", [True, False])
async def test_calls_or_a_form(
    marked: tuple[Grammars, Any],
    checks: FormChecks,
    grammars: Grammars,
    encode: Any,
    has_marks: bool,
    kind: str,
    form: dict[str, Any],
    good: list[str],
    bad: list[str],
) -> None:
    """With a tokenizer that has the marks of calls as tokens, and with one that spells them."""
    wanted = beside_calls(TAGS[kind], **form)
    of, end = grammars, EOS
    if has_marks:
        (of, tokenizer), end = marked, 0
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    else:
        await checks.check(wanted)
    for text, is_good in [(text, True) for text in good] + [(text, False) for text in bad]:
        grammar = of.compiled(wanted, [end], 0, []).result()
        tokens, fitting = [*encode(text), end], True
        for token in tokens:
            fitting = fitting and token in allowed(of, grammar) and grammar.accept_tokens("", [token])
        assert fitting is is_good, (text, grammar.error)


def test_without_parallel_calls_one_call_alone_fits(marked: tuple[Grammars, Any]) -> None:
    grammars, tokenizer = marked
    wanted = beside_calls(MARKED_TAGS, parallel=False, json_object=True)
    for text, is_good in ((CALL, True), (f"{CALL}\n{CALL}", False), (CALL + CALL, False)):
        tokens = [*tokenizer.encode(text, add_special_tokens=False), 0]
        assert grammars.compiled(wanted, [0], 0, []).result().accept_tokens("", tokens) is is_good


@pytest.mark.parametrize("kind", TAGS)
def test_walks_end_in_calls_or_in_the_form_and_are_read_so(marked: tuple[Grammars, Any], kind: str) -> None:
    """Also if another engine goes on behind any token."""
    grammars, tokenizer = marked
    draw, seen = random.Random(5), set()
    wanted = beside_calls(TAGS[kind], json=json.dumps(ANSWER), disable_any_whitespace=True)
    for _ in range(60):
        grammar, output = grammars.compiled(wanted, [0], 0, []).result(), list[int]()
        cut = draw.randrange(40)
        while not output or output[-1] != 0:
            if len(output) == cut:
                grammar = grammars.compiled(wanted, [0], 0, output).result()
            fitting = sorted(allowed(grammars, grammar))
            output.append(0 if 0 in fitting and draw.random() < 0.7 else draw.choice(fitting))
            assert grammar.accept_tokens("", output[-1:]), grammar.error
            assert len(output) < 600
        parts = TaggedCalls(TAGS[kind], lambda name, position: "id").push(tokenizer.decode(output[:-1]), finished=True)
        calls = joined_calls(list(parts.tool_calls))
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        if not calls:
            jsonschema.validate(json.loads(parts.content), ANSWER)
        seen.add(min(len(calls), 2))
    assert seen == {0, 1, 2}


def test_a_form_behind_a_token_beside_calls(marked: tuple[Grammars, Any]) -> None:
    grammars, tokenizer = marked
    end = tokenizer.convert_tokens_to_ids("</think>")
    wanted = dataclasses.replace(beside_calls(MARKED_TAGS, json_object=True), begins_after=end)
    for text in (CALL, '{"a": 1}'):
        tokens = tokenizer.encode(f"x</think>{text}", add_special_tokens=False)
        assert grammars.compiled(wanted, [0], 0, []).result().accept_tokens("", [*tokens, 0])
    tokens = tokenizer.encode(CALL, add_special_tokens=False)
    assert not grammars.compiled(wanted, [0], 0, []).result().accept_tokens("", [*tokens, 0])


def test_tagged_text_has_the_marks_as_tokens(marked: tuple[Grammars, Any]) -> None:
    grammars, tokenizer = marked
    structures = [{"begin": tag.begin, "schema": tag.schema, "end": tag.end} for tag in MARKED_TAGS]
    tag = {"structures": structures, "triggers": ["<tool_call>"]}
    grammar = {"structural_tag": json.dumps(tag)}
    for text, is_good in [
        (f"So: {CALL}\n{OTHER_CALL} and", True),
        ("3 < 4", True),
        (CALL.replace("low", "lower"), False),
        ("<tool_call>x", False),
    ]:
        tokens = [*tokenizer.encode(text, add_special_tokens=False), 0]
        assert grammars.compiled(StructuredOutputs(**grammar), [0], 0, []).result().accept_tokens("", tokens) is is_good
