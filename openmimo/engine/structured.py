"""Structured output: which tokens may follow, so that a text has the form that its request asks for.

The grammar machinery is llguidance's (docs/decisions/0006-structured-output.md): it takes JSON schemas, regular
expressions and Lark grammars, and can take tokens back, which judging drafts needs. V vocabulary.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from openmimo.core.errors import UserError
from openmimo.core.records import Structure
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.structure_check import StructureChecker, error_of, new_matcher

_REMEMBERED_VERDICTS = 64
_CHECKER = StructureChecker()


class StructureState:
    """How far one text has come in its structure.

    Args:
        new: Makes a matcher at the start of a text. Copies of one matcher share a lexer, and a lexer that met a limit
            stays unusable, so every state has a matcher of its own.
        vocab_size: Of the model.
    """

    def __init__(self, new: Callable[[], LLMatcher], vocab_size: int):
        self._new = new
        self._matcher = new()
        self._vocab_size = vocab_size
        self._tokens: list[int] = []

    @property
    def error(self) -> str:
        """Why the text cannot go on, or "": a limit of the library was met, or no text of the form continues it."""
        return error_of(self._matcher)

    def allowed(self) -> torch.Tensor:
        """Bool [V]: the tokens that may come next; the ends of a text among them once it is complete.

        None is allowed where the matcher fails on the way, and `error` says why; the library allows the ends there.
        """
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed_V = np.zeros(self._vocab_size, dtype=bool)
        known = min(len(bits), self._vocab_size)
        if not self._matcher.is_error():
            allowed_V[:known] = bits[:known]
        return torch.from_numpy(allowed_V)

    def accept(self, token: int) -> None:
        """The text goes on with this token; one that was not allowed is an error."""
        self._matcher.consume_token(token)
        self._tokens.append(token)

    def rollback(self, num_tokens: int) -> None:
        """Takes back the tokens accepted last, and an error that was met behind them."""
        del self._tokens[len(self._tokens) - num_tokens :]
        if self._matcher.is_error():
            self._matcher = self._new()
            self._matcher.consume_tokens(self._tokens)
        else:
            self._matcher.rollback(num_tokens)


class StructureCompiler:
    """Grammars for one tokenizer. Threads may share a compiler.

    Args:
        tokenizer: Its bytes are what a grammar is matched with.
        vocab_size: Of the model.
        eos_ids: What ends a text.

    Raises:
        UserError: There is no end-of-text id.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]):
        if not eos_ids:
            raise UserError(
                "structured output needs an end-of-text id, and neither checkpoint nor tokenizer names one."
            )
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, eos_ids)), eos_token=sorted(eos_ids))

    def check(self, structure: Structure) -> None:
        """Raises UserError for a grammar, schema or pattern that is wrong, has no text or is too complex."""
        problem = _problem(structure)
        if problem:
            raise UserError(f"the {structure.kind} {problem}.")

    def start(self, structure: Structure) -> StructureState:
        """The state of an empty text. Raises UserError as `check` does."""
        self.check(structure)
        new = functools.partial(new_matcher, self._tokenizer, structure)
        return StructureState(new, self._vocab_size)


@functools.lru_cache(maxsize=_REMEMBERED_VERDICTS)
def _problem(structure: Structure) -> str:
    """Why a structure cannot be used, "" if it can."""
    return _CHECKER.problem(structure)


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
