"""`openmimo generate` and `openmimo chat`: streaming text in the terminal, followed by statistics."""

import sys
from dataclasses import replace
from typing import Any

from rich.console import Console

from openmimo.core.errors import Interrupted, UserError
from openmimo.core.records import Message, SamplingParams
from openmimo.data.chat.template import encode_chat
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig, WeightFormat
from openmimo.engine.llm import LLM

_STDERR = Console(stderr=True)
_CHAT_HELP = "/reset forgets the conversation, /quit (or the end of input) leaves"


def load(path: str, engine: EngineConfig, *, dtype: str, device: str, weights: WeightFormat) -> LLM:
    """Load an LLM with its tokenizer. Raises DataError if the folder has no tokenizer."""
    return LLM(path, Tokenizer.load(path), engine=engine, dtype=dtype, device=device, weights=weights)


def generate(
    llm: LLM, prompt: str, sampling: SamplingParams, *, as_chat: bool, thinking: bool, system: str | None
) -> None:
    """Print the continuation of `prompt` ("-": standard input), and the engine's statistics on standard error.

    Raises UserError if the engine cannot finish it.
    """
    text = _piped_text() if prompt == "-" else prompt
    llm_prompt: str | list[int] = text
    if as_chat:
        turns = [Message("system", system)] if system else []
        assert llm.tokenizer is not None, "the command line loads a tokenizer"
        llm_prompt = encode_chat(llm.tokenizer, [*turns, Message("user", text)], enable_thinking=thinking)
    _print_stream(llm, llm_prompt, sampling, can_stop=False)
    _print_figures(llm.stats())


def chat(llm: LLM, sampling: SamplingParams, *, thinking: bool, system: str | None) -> None:
    """Hold a conversation until /quit or the end of input. A conversation that exceeds the context length is reset.

    Raises UserError if the engine cannot finish an answer.
    """
    opening = [Message("system", system)] if system else []
    turns = list(opening)
    _STDERR.print(_CHAT_HELP, style="dim")
    while True:
        question = _read_line()
        if question is None or question == "/quit":
            return
        if question == "/reset":
            turns = list(opening)
            continue
        if not question:
            continue
        turns.append(Message("user", question))
        assert llm.tokenizer is not None, "the command line loads a tokenizer"
        ids = encode_chat(llm.tokenizer, turns, enable_thinking=thinking)
        room = llm.model.config.max_positions - len(ids)
        if room < 1:
            _STDERR.print(
                f"the conversation exceeds the model's {llm.model.config.max_positions} positions and is reset",
                style="yellow",
            )
            turns = list(opening)
            continue
        llm.reset_stats()
        answer = _print_stream(llm, ids, replace(sampling, max_tokens=min(sampling.max_tokens, room)), can_stop=True)
        turns.append(Message("assistant", answer))
        _print_figures(llm.stats())


def _read_line() -> str | None:
    try:
        return _encodable(input("\n> ").strip())
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error}.") from error


def _piped_text() -> str:
    try:
        return _encodable(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error}.") from error


def _encodable(text: str) -> str:
    """Return `text`. Raises UserError if it contains the surrogate escapes of invalid UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error}.") from error
    return text


def _print_stream(llm: LLM, prompt: str | list[int], sampling: SamplingParams, *, can_stop: bool) -> str:
    """Print a streamed text. With `can_stop`, Ctrl-C ends the text and not the command."""
    pieces = []
    try:
        for piece in llm.stream(prompt, sampling):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt as interrupt:
        print()
        if not can_stop or isinstance(interrupt, Interrupted):
            raise
        _STDERR.print("[dim]stopped[/]", end="")
    except UserError:
        if pieces:
            print()
        raise
    print()
    return "".join(pieces)


def _print_figures(stats: dict[str, Any]) -> None:
    line = f"{stats['num_new_tokens']} tokens, {stats['tokens_per_second']:.0f} tokens/s"
    if stats["acceptance_by_head"]:
        shares = ", ".join(f"{share:.0%}" for share in stats["acceptance_by_head"])
        line += f", {stats['accepted_tokens_per_step']:.2f} tokens a step (drafts accepted by head: {shares})"
    _STDERR.print(line, style="dim", highlight=False)


def check_prompt(prompt: str) -> None:
    """Raise UserError if the prompt is to be read from standard input, but that is a terminal or closed."""
    if prompt == "-" and (sys.stdin is None or sys.stdin.isatty()):
        raise UserError("no prompt: give --prompt TEXT, or pipe one into standard input.")
