"""Structures: allowed tokens, ends, and refusals before a request runs."""

import json
import random
import re
import uuid
from dataclasses import replace
from datetime import date, datetime, time, timedelta
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest

from openmimo.core.errors import UserError
from openmimo.core.records import Structure
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.structured import StructureCompiler

TOKENIZER = Tokenizer.train(["some words to learn from, 12 and 34", '{"answer": "yes"}'], vocab_size=330)
VOCAB = 384  # an embedding padded beyond the tokenizer
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}
STRUCTURES = {
    "regex": (Structure("regex", "(yes|no), [0-9]{3}"), lambda text: re.fullmatch("(yes|no), [0-9]{3}", text)),
    "schema": (Structure("json_schema", json.dumps(SCHEMA)), lambda text: set(json.loads(text)) == {"kind", "size"}),
    "grammar": (Structure("grammar", 'start: "(" start ")" | "x"'), lambda text: text.count("(") == text.count(")")),
}


@pytest.fixture(scope="module")
def compiler():
    return StructureCompiler(TOKENIZER, VOCAB, frozenset(TOKENIZER.eos_token_ids))


def random_text(state, seed):
    """Accepts random allowed tokens up to an allowed end, with a rollback before each. Returns the text."""
    choose, tokens = random.Random(seed), []
    while True:
        allowed = state.allowed().nonzero()[:, 0].tolist()
        assert max(allowed) < TOKENIZER.vocab_size
        token = choose.choice(allowed)
        if token in TOKENIZER.eos_token_ids:
            return TOKENIZER.decode(tokens)
        other = choose.choice([one for one in allowed if one not in TOKENIZER.eos_token_ids])
        state.accept(other)
        state.rollback(1)
        state.accept(token)
        tokens.append(token)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_allowed_text_has_the_form(compiler, name):
    structure, fits = STRUCTURES[name]
    for seed in range(10):
        state = compiler.start(structure)
        assert fits(random_text(state, seed)) and not state.error


def test_thoughts_come_first_and_an_alternative_may_take_the_place_of_the_form(compiler):
    thoughts, call = r"<think>(.|\n)*</think>", r"<tool_call>\n<function=(f|g/h)>(.|\n){0,5}"
    for name, (structure, fits) in STRUCTURES.items():
        combined = replace(structure, prefix=thoughts, alternative=call)
        seen = set()
        for seed in range(12):
            text = random_text(compiler.start(combined), seed)
            assert text.startswith("<think>")
            rest = text.split("</think>", 1)[1]
            is_call = re.fullmatch(call, rest) is not None
            assert is_call or fits(rest), (name, text)
            seen.add(is_call)
        assert seen == {True, False}, name
        text = random_text(compiler.start(replace(structure, prefix=thoughts)), 0)
        assert text.startswith("<think>") and fits(text.split("</think>", 1)[1])


PYDANTIC_SCHEMAS = [  # a schema as pydantic writes it, texts of it, and others
    ({"additionalProperties": {"type": "integer"}, "propertyNames": {"enum": ["a", "b.c"]}, "type": "object"},
     ['{"a": 1}', '{"b.c": 2, "a": 1}', "{}"], ['{"bxc": 1}', '{"a": "x"}']),
    ({"additionalProperties": {"type": "integer"}, "propertyNames": {"$ref": "#/$defs/C"}, "type": "object",
      "$defs": {"C": {"enum": ["r"], "type": "string", "title": "C"}}}, ['{"r": 1}'], ['{"s": 1}']),
    ({"additionalProperties": {"type": "null"}, "propertyNames": {"minLength": 2, "maxLength": 3}, "type": "object"},
     ['{"ab": null}'], ['{"a": null}', '{"abcd": null}']),
    ({"type": "object", "properties": {"uniqueItems": {"type": "integer"}}, "required": ["uniqueItems"]},
     ['{"uniqueItems": 3}'], ["{}"]),
    ({"items": {"type": "integer"}, "type": "array", "uniqueItems": True}, ["[1, 2]", "[]"], ['["a"]']),
    ({"format": "binary", "type": "string"}, ['"a"'], ["1"]),
    ({"oneOf": [{"type": "object", "properties": {"k": {"const": kind}, "v": {"type": of}}, "required": ["k", "v"]}
                for kind, of in (("x", "integer"), ("y", "string"))], "discriminator": {"propertyName": "k"}},
     ['{"k": "x", "v": 1}', '{"k": "y", "v": "s"}'], ['{"k": "x", "v": "s"}']),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "texts", "others"), PYDANTIC_SCHEMAS, ids=range(len(PYDANTIC_SCHEMAS)))
def test_schemas_of_pydantic_are_followed(compiler, schema, texts, others):
    def allows(text):
        state = compiler.start(Structure("json_schema", json.dumps(schema)))
        for token in TOKENIZER.encode(text):
            if not state.allowed()[token]:
                return False
            state.accept(token)
        return bool(state.allowed()[list(TOKENIZER.eos_token_ids)].any())

    assert [text for text in texts if not allows(text)] == []
    assert [text for text in others if allows(text)] == []


KEYS = [
    uuid.UUID, pydantic.UUID4, date, datetime, time, timedelta, IPv4Address, IPv6Address, Path, bytes,
    pydantic.AnyUrl, Annotated[str, pydantic.StringConstraints(min_length=2, max_length=4)], Literal["a", "b"],
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_maps_by_what_pydantic_has_as_keys(compiler, key):
    kind = pydantic.TypeAdapter(dict[key, Literal[1, 2]])
    structure = Structure("json_schema", json.dumps(kind.json_schema() | {"maxProperties": 2}))
    compiler.check(structure)
    maps = [kind.validate_json(random_text(compiler.start(structure), seed)) for seed in range(5)]
    assert any(maps)


@pytest.mark.parametrize(
    ("items", "fields"),
    [
        ({"enum": ["a", "b", "c", "d"]}, {}),
        ({"type": "boolean"}, {"minItems": 1}),
        ({"$ref": "#/$defs/Color"}, {"maxItems": 2}),
        ({"anyOf": [{"const": 1}, {"enum": ["1", None]}]}, {"minItems": 2, "title": "Set"}),
        ({"enum": list("abcdefghijkl")}, {"maxItems": 2}),
    ],
    ids=str,
)
def test_lists_of_few_values_have_no_repeated_items(compiler, items, fields):
    array = {"type": "array", "uniqueItems": True, "items": items, **fields}
    schema = {"type": "object", "properties": {"set": array}, "required": ["set"], "additionalProperties": False}
    schema["$defs"] = {"Color": {"enum": ["red", "green"], "type": "string"}}
    structure = Structure("json_schema", json.dumps(schema))
    lengths = set()
    for seed in range(5):
        values = [json.dumps(value) for value in json.loads(random_text(compiler.start(structure), seed))["set"]]
        assert len(set(values)) == len(values) and fields.get("minItems", 0) <= len(values)
        lengths.add(len(values))
    assert len(lengths) > 1


BAD_PARTS = [
    {"type": ["array"], "uniqueItems": True, "items": {"enum": [1]}},
    {"type": "array", "uniqueItems": True, "items": {"type": ["string"], "enum": ["a"]}},
    {"type": "array", "uniqueItems": True, "items": {"$ref": "#/$defs/Loop"}, "minItems": 10**9},
    {"type": "object", "propertyNames": {"format": ["uuid"]}},
    {"type": "string", "format": {"a": 1}},
    {"type": "array", "uniqueItems": True, "items": {"anyOf": [{"enum": list(range(400))}] * 300}, "maxItems": 400},
]


@pytest.mark.parametrize("part", BAD_PARTS, ids=lambda part: str(part)[:60])
def test_odd_schemas_are_followed_or_refused(compiler, part):
    loop = {"anyOf": [{"$ref": "#/$defs/Loop"}]}
    structure = Structure("json_schema", json.dumps({"properties": {"a": part}, "$defs": {"Loop": loop}}))
    try:
        compiler.check(structure)
    except UserError as error:
        assert "too complex" not in str(error)


def test_states_of_one_structure_do_not_share_their_progress(compiler):
    structure = STRUCTURES["regex"][0]
    first, second = compiler.start(structure), compiler.start(structure)
    first.accept(TOKENIZER.encode("n")[0])
    assert second.allowed().tolist() == compiler.start(structure).allowed().tolist() != first.allowed().tolist()


def test_markup_is_text_and_ends_of_turns_are_not(compiler):
    allowed = compiler.start(Structure("regex", "(.|\n)*")).allowed()
    assert allowed[TOKENIZER.id_of("</tool_call>")]
    assert not allowed[TOKENIZER.id_of("<|im_start|>")]


def test_a_token_that_was_not_allowed_is_an_error(compiler):
    state = compiler.start(STRUCTURES["regex"][0])
    state.accept(TOKENIZER.encode("z")[0])
    assert state.error


@pytest.mark.parametrize(
    "structure",
    [
        Structure("regex", "((("),
        Structure("json_schema", '{"type": 12}'),
        Structure("json_schema", "{"),
        Structure("grammar", "start: undefined"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused(compiler, structure):
    with pytest.raises(UserError, match=f"the {structure.kind} cannot be"):
        compiler.check(structure)


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(UserError, match="end-of-text"):
        StructureCompiler(TOKENIZER, VOCAB, frozenset())


def _schema(**fields):
    return Structure("json_schema", json.dumps(fields))


WITHOUT_TEXT = [
    _schema(**{"$ref": "#"}),
    _schema(**{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    _schema(type="object", properties={"a": {"$ref": "#"}}, required=["a"]),
    _schema(type="array", items={"$ref": "#"}, minItems=1),
    _schema(type="integer", minimum=5, maximum=3),
    _schema(allOf=[{"type": "string"}, {"type": "integer"}]),
    Structure("regex", r"[^\s\S]"),
    Structure("regex", r"ab[^\s\S]"),
    Structure("grammar", "start: a\na: a"),
    Structure("grammar", 'start: "x" a\na: "b" a | a "c"'),
    Structure("grammar", 'start: "x" start'),
    Structure("grammar", 'start: "(" start ")" | ("x" | "y") start+'),
    Structure("grammar", 'start: "x" A\nA: /a+/ & /b+/'),
]
TOO_COMPLEX = [
    Structure("regex", "a{20000000}"),
    Structure("regex", "((a{1,100}){1,100}){1,100}"),
    pytest.param(_schema(type="integer", multipleOf=10000019), marks=pytest.mark.slow),  # takes longest to be refused
    Structure("grammar", "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1} | "b"' for i in range(9000)) + '\nr9000: "x"'),
    Structure("regex", "a" * (1 << 19)),
]


@pytest.mark.parametrize("structure", WITHOUT_TEXT, ids=lambda structure: structure.source[:60])
def test_a_form_without_any_text_is_refused(compiler, structure):
    with pytest.raises(UserError, match="allows no text|Unsatisfiable"):
        compiler.start(structure)


@pytest.mark.parametrize("structure", TOO_COMPLEX, ids=lambda structure: structure.source[:30])
def test_a_form_that_is_too_complex_is_refused_and_harms_no_other(compiler, structure):
    for _ in range(2):
        with pytest.raises(UserError, match=r"too complex|characters; give at most"):
            compiler.start(structure)
    assert not compiler.start(STRUCTURES["regex"][0]).error


@pytest.mark.parametrize(
    "structure",
    [
        _schema(type="object", properties={"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, required=["next"]),
        _schema(type="array", items={"$ref": "#"}),
        _schema(type="object", properties={"a": {"type": "integer", "minimum": 5, "maximum": 3}}),
        Structure("grammar", 'start: "(" start ")" | b  // a comment\n  | "y" start*\nb: "w"'),
        Structure("grammar", 'start: "x" j\nj: %json {"type": "integer"}'),
        Structure("grammar", "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(300)) + '\nr300: "x"'),
        Structure("regex", "(a|)"),
    ],
    ids=lambda structure: structure.source[:60],
)
def test_recursion_that_can_end_is_accepted(compiler, structure):
    assert compiler.start(structure).allowed().any()


LARGE = Structure("regex", "([a-z]{1,40} ?){200,300}")


def _until_it_fails(state):
    """Accepts words of two letters until no token is allowed. Returns their number."""
    letters, tokens = [TOKENIZER.encode(letter)[0] for letter in "ab"], 0
    while state.allowed().any():
        state.accept(letters[tokens % 2])
        tokens += 1
        assert tokens < 10_000
    return tokens


def test_a_limit_met_on_the_way_allows_no_token_and_leaves_other_texts_alone(compiler):
    state = compiler.start(LARGE)
    first = _until_it_fails(state)
    assert first > 10 and "too many" in state.error
    again = compiler.start(LARGE)
    assert not again.error and _until_it_fails(again) == first


def test_an_error_behind_a_draft_is_taken_back_with_it(compiler):
    state = compiler.start(STRUCTURES["regex"][0])
    state.accept(TOKENIZER.encode("n")[0])
    expected = state.allowed()
    state.accept(TOKENIZER.encode("o")[0])
    state.accept(TOKENIZER.encode("z")[0])
    assert state.error
    state.rollback(2)
    assert not state.error and state.allowed().equal(expected)


def test_threads_may_check_and_start_at_once(compiler):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        states = list(pool.map(lambda n: compiler.start(Structure("regex", f"a{{{n % 4 + 1}}}")), range(32)))
    assert all(state.allowed().any() for state in states)
