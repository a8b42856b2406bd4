"""Structured output: which tokens may follow, so that a text has the form that its request asks for.

The grammar machinery is llguidance's (docs/decisions/0006-structured-output.md): it takes JSON schemas, regular
expressions and Lark grammars, and can take tokens back, which judging drafts needs. V vocabulary.
"""

import functools

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from openmimo.core.errors import UserError
from openmimo.core.records import Structure
from openmimo.data.tokenizer import Tokenizer

_REMEMBERED_GRAMMARS = 64
# Between the parts of a JSON text: nothing, a space, or a line end and an indent. Nobody can fill a reply with these.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ \t]{0,24})?"}


class StructureState:
    """How far one text has come in its structure. error: why it cannot go on ("" if it can)."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def error(self) -> str:
        """A limit of the grammar engine that was met (a grammar too complex to follow), or ""."""
        return self._matcher.get_error()

    def allowed(self) -> torch.Tensor:
        """Bool [V]: the tokens that may come next; the ends of a text among them once it is complete."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed_V = np.zeros(self._vocab_size, dtype=bool)
        known = min(len(bits), self._vocab_size)
        allowed_V[:known] = bits[:known]
        return torch.from_numpy(allowed_V)

    def accept(self, token: int) -> None:
        """The text goes on with this token; one that was not allowed is an error."""
        self._matcher.consume_token(token)

    def rollback(self, num_tokens: int) -> None:
        """Takes back the tokens accepted last."""
        self._matcher.rollback(num_tokens)


class StructureCompiler:
    """Grammars for one tokenizer. vocab_size: of the model. eos_ids: what ends a text. Raises UserError for none."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]):
        if not eos_ids:
            raise UserError(
                "structured output needs an end-of-text id, and neither checkpoint nor tokenizer names one."
            )
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, eos_ids)), eos_token=sorted(eos_ids))
        self._compiled = functools.lru_cache(maxsize=_REMEMBERED_GRAMMARS)(self._compile)

    def check(self, structure: Structure) -> None:
        """Raises UserError if there is no such grammar, schema or pattern."""
        self._compiled(structure)

    def start(self, structure: Structure) -> StructureState:
        """The state of an empty text. Raises UserError as `check` does."""
        return StructureState(self._compiled(structure).deep_copy(), self._vocab_size)

    def _compile(self, structure: Structure) -> LLMatcher:
        try:
            matcher = LLMatcher(self._tokenizer, _grammar(structure), log_level=0)
        except ValueError as error:
            raise UserError(f"the {structure.kind} cannot be read: {error}") from error
        if matcher.is_error():
            raise UserError(f"the {structure.kind} cannot be followed: {' '.join(matcher.get_error().split())}")
        return matcher


class _Vocabulary:
    """A tokenizer as llguidance reads one. Markup such as `</tool_call>` is text here; ends of turns are not."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int]):
        self.eos_token_id = min(eos_ids)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_token_ids | eos_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)


def _grammar(structure: Structure) -> str:
    """The structure in llguidance's own form. Raises ValueError for a schema that is no JSON."""
    if structure.kind == "regex":
        return LLMatcher.grammar_from_regex(structure.source)
    if structure.kind == "grammar":
        return LLMatcher.grammar_from_lark(structure.source)
    schema = structure.source if structure.kind == "json_schema" else '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
