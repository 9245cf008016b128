"""Forms of output: what compiles, which tokens fit, and how a form ends or fails."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from transformers import AutoTokenizer

from preft.core.errors import InvalidRequest
from preft.core.structured import StructuredOutputs
from preft.engine.grammar import FormChecks, Grammars, OutputGrammar
from support.json_schemas import random_schema
from support.models import EOS, make_model
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
