"""Structures: what they allow token by token, how they end, and what is refused before anything runs."""

import json
import random
import re

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
    """A text of random allowed tokens, each tried, taken back and taken again; up to an end that was allowed."""
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
