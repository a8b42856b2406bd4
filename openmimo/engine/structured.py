"""Structured output: the tokens that may follow so that a text has the structure that its request asks for.

llguidance compiles and matches the structures (docs/decisions/0006-structured-output.md). It supports JSON schemas,
regular expressions and Lark grammars, and can roll tokens back, which the verification of drafts needs.

V vocabulary.
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

_MAX_CACHED_CHECKS = 64
_CHECKER = StructureChecker()


class StructureState:
    """The state of one text in its structure.

    Args:
        new: Creates a matcher at the start of a text. Copies of a matcher share a lexer, and a lexer that has exceeded
            a limit remains unusable, so every state creates its matcher.
        vocab_size: Vocabulary size of the model.
    """

    def __init__(self, new: Callable[[], LLMatcher], vocab_size: int):
        self._new = new
        self._matcher = new()
        self._vocab_size = vocab_size
        self._tokens: list[int] = []

    @property
    def error(self) -> str:
        """The reason why the text cannot continue (a limit of the library, or no possible token), or ""."""
        return error_of(self._matcher)

    def allowed_bits(self) -> np.ndarray:
        """Return the tokens that may come next, a bit for each, in the form of `sampler.RowChange`.

        If the text is complete, they include the stop tokens. If the matcher fails, no token is allowed, although the
        library would allow the stop tokens. `error` has the reason.
        """
        bits = np.zeros(-(-self._vocab_size // 8), dtype=np.uint8)
        found = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: len(bits)]
        if not self._matcher.is_error():
            bits[: len(found)] = found
        return bits

    def allowed(self) -> torch.Tensor:
        """Return the tokens of `allowed_bits`, bool [V]."""
        return torch.from_numpy(np.unpackbits(self.allowed_bits(), count=self._vocab_size, bitorder="little") > 0)

    def accept(self, token: int) -> None:
        """Append a token to the text. A token that is not allowed is an error."""
        self._matcher.consume_token(token)
        self._tokens.append(token)

    def rollback(self, num_tokens: int) -> None:
        """Remove the last tokens, and an error that occurred after them."""
        del self._tokens[len(self._tokens) - num_tokens :]
        if self._matcher.is_error():
            self._matcher = self._new()
            self._matcher.consume_tokens(self._tokens)
        else:
            self._matcher.rollback(num_tokens)


class StructureCompiler:
    """Compiles structures for one tokenizer. Thread-safe.

    Args:
        tokenizer: The tokenizer, whose bytes are matched.
        vocab_size: Vocabulary size of the model.
        eos_ids: Ids that end a text.

    Raises:
        UserError: There is no id that ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]):
        if not eos_ids:
            raise UserError(
                "structured output needs an end-of-text id, but neither the checkpoint nor the tokenizer has one."
            )
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, eos_ids)), eos_token=sorted(eos_ids))

    def check(self, structure: Structure) -> None:
        """Raise UserError for a grammar, schema or pattern that is invalid, allows no text or is too complex."""
        problem = _problem(structure)
        if problem:
            raise UserError(f"the {structure.kind} {problem}.")

    def start(self, structure: Structure) -> StructureState:
        """Return the state of an empty text. Raises UserError as `check` does."""
        self.check(structure)
        new = functools.partial(new_matcher, self._tokenizer, structure)
        return StructureState(new, self._vocab_size)


@functools.lru_cache(maxsize=_MAX_CACHED_CHECKS)
def _problem(structure: Structure) -> str:
    """Return the reason why a structure cannot be used, or ""."""
    return _CHECKER.problem(structure)


class _Vocabulary:
    """Adapts a tokenizer to llguidance. Only ends of texts and turns are special tokens; other tags are text."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int]):
        self.eos_token_id = min(eos_ids)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_token_ids | eos_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)
