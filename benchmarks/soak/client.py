"""The client of the soak test: sends a request, reads the whole reply, and validates it."""

import asyncio
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.soak.http import Connection, Response
from benchmarks.soak.load import SCHEMA, TOOLS, Planned, next_turn

_MAX_REFUSALS = 120
_ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request. Times are those of the last attempt.

    Attributes:
        planned: The request.
        status: Status of the last attempt (0: no response).
        problem: What is wrong with the reply ("": nothing).
        was_cancelled: Whether the client disconnected as planned.
        num_refusals: Attempts that got a 429.
        retry_after_seconds: Retry-After header of the last attempt.
        texts: Text of each choice.
        finish_reasons: Finish reason of each choice.
        num_tokens: Tokens of all choices.
        seconds_in_all: Time to the end of the reply.
        seconds_to_first: Time to the first token; only for streams.
        seconds_per_token: Mean time between tokens; only for streams with one choice.
    """

    planned: Planned
    status: int = 0
    problem: str = ""
    was_cancelled: bool = False
    num_refusals: int = 0
    retry_after_seconds: float | None = None
    texts: tuple[str, ...] = ()
    finish_reasons: tuple[str, ...] = ()
    num_tokens: int = 0
    seconds_in_all: float = 0.0
    seconds_to_first: float | None = None
    seconds_per_token: float | None = None


async def ask(connection: Connection, planned: Planned) -> list[Outcome]:
    """Sends a request, and the later turns of its conversation, each after the reply to the last one."""
    outcomes = [await _ask_once(connection, planned)]
    while outcomes[-1].planned.later_turns and outcomes[-1].status == 200 and not outcomes[-1].problem:
        outcomes.append(await _ask_once(connection, next_turn(outcomes[-1].planned, outcomes[-1].texts[0])))
    return outcomes


async def _ask_once(connection: Connection, planned: Planned) -> Outcome:
    """Sends the request until it is answered or cancelled. After a 429, waits for the time in Retry-After."""
    if planned.cut:
        return await _cut(connection, planned)
    for num_refusals in range(_MAX_REFUSALS):
        try:
            async with asyncio.timeout(planned.cancel_after_seconds):
                outcome = await _attempt(connection, planned)
        except TimeoutError:
            connection.close()
            return Outcome(planned, was_cancelled=True, num_refusals=num_refusals)
        except (ConnectionError, ValueError) as error:
            connection.close()
            return Outcome(planned, problem=f"lost: {type(error).__name__} {error}", num_refusals=num_refusals)
        if outcome.status != 429 or outcome.problem or outcome.retry_after_seconds is None:
            return replace(outcome, num_refusals=num_refusals)
        await asyncio.sleep(outcome.retry_after_seconds)
    return replace(outcome, problem=f"refused with 429 {_MAX_REFUSALS} times")


async def _cut(connection: Connection, planned: Planned) -> Outcome:
    """Breaks the connection: within the request, right after it, or (with RST) within the reply."""
    try:
        if planned.cut == "reply":
            response = await connection.request("POST", planned.path, planned.content)
            async for _ in response.lines():
                break
            connection.reset()
        else:
            share = 0.5 if planned.cut == "request" else 1.0
            await connection.send_part(planned.path, planned.content, int(share * len(planned.content)))
            connection.close()
    except ConnectionError as error:
        connection.close()
        return Outcome(planned, problem=f"lost: {type(error).__name__} {error}")
    return Outcome(planned, was_cancelled=True)


async def _attempt(connection: Connection, planned: Planned) -> Outcome:
    start = time.perf_counter()
    response = await connection.request("POST", planned.path, planned.content)
    if response.status != 200:
        return _refused(planned, response, await response.read())
    reply = _Reply(planned, start)
    if not planned.streams:
        reply.take_whole(json.loads(await response.read()))
        return reply.outcome()
    num_events = 0
    async for line in response.lines():
        if line.startswith("data: "):
            reply.take_event(line.removeprefix("data: "))
            num_events += 1
        if num_events == planned.cancel_after_events:
            connection.close()
            return Outcome(planned, status=200, was_cancelled=True)
    return reply.outcome()


def _refused(planned: Planned, response: Response, body: bytes) -> Outcome:
    """Validates an error response. It must have the planned status or 429, and OpenAI's format."""
    status, text = response.status, body[:200].decode(errors="replace")
    retry_after = response.headers.get("retry-after", "")
    outcome = Outcome(planned, status=status, retry_after_seconds=float(retry_after) if retry_after.isdigit() else None)
    error = _error_of(body)
    expected = (400, 429) if planned.is_hostile else (planned.status, 429)
    if status not in expected:
        problem = f"status {status} instead of {expected[0]}: {text}"
    elif error is None or not error["message"] or error["type"] != _ERROR_TYPES[status]:
        problem = f"a {status} that is not in OpenAI's format: {text}"
    elif status == 429:
        problem = "" if retry_after.isdigit() else "a 429 without Retry-After"
    else:
        is_other = planned.error_code not in (None, error["code"])
        problem = f"code {error['code']!r} instead of {planned.error_code!r}" if is_other else ""
    return replace(outcome, problem=problem)


def _error_of(body: bytes) -> dict[str, Any] | None:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return error if set(error) == {"message", "type", "param", "code"} else None


@dataclass
class _Choice:
    text: str = ""
    num_tokens: int = 0
    num_logprobs: int = 0
    finish_reason: str | None = None
    called: str = ""
    arguments: str = ""

    def take(self, data: dict[str, Any]) -> None:
        """Adds a choice object of a reply or of a chunk."""
        said = data.get("message") or data.get("delta") or {}
        self.text += data.get("text") or said.get("content") or ""
        self.num_tokens += len(data.get("token_ids") or ())
        for call in (said.get("tool_calls") or ())[:1]:
            self.called += call["function"].get("name") or ""
            self.arguments += call["function"].get("arguments") or ""
        logprobs = data.get("logprobs") or {}
        self.num_logprobs += len(logprobs.get("content") or logprobs.get("tokens") or ())
        self.finish_reason = data.get("finish_reason") or self.finish_reason


@dataclass
class _Reply:
    """The received part of a reply."""

    planned: Planned
    start: float
    choices: dict[int, _Choice] = field(default_factory=lambda: defaultdict(_Choice))
    first: float | None = None
    last: float = 0.0
    usage: dict[str, Any] | None = None
    is_done: bool = False
    error: str = ""

    def take_whole(self, data: dict[str, Any]) -> None:
        """Adds a reply that is not a stream."""
        self._take(data)
        self.is_done = True

    def take_event(self, text: str) -> None:
        """Adds an event of a stream."""
        if text == "[DONE]":
            self.is_done = True
            return
        data = json.loads(text)
        if "error" in data:
            self.error = f"the stream ended with {data['error']}"
            return
        self._take(data)
        if any(choice.get("token_ids") for choice in data["choices"]):
            self.last = time.perf_counter()
            self.first = self.last if self.first is None else self.first

    def outcome(self) -> Outcome:
        """Returns the outcome. Call it after the whole reply."""
        num_tokens = sum(choice.num_tokens for choice in self.choices.values())
        per_token = None
        if self.first is not None and len(self.choices) == 1 and num_tokens > 1:
            per_token = (self.last - self.first) / (num_tokens - 1)
        return Outcome(
            self.planned,
            status=200,
            problem=self.error or self._problem(),
            texts=tuple(self.choices[index].text for index in sorted(self.choices)),
            finish_reasons=tuple(self.choices[index].finish_reason or "none" for index in sorted(self.choices)),
            num_tokens=num_tokens,
            seconds_in_all=time.perf_counter() - self.start,
            seconds_to_first=None if self.first is None else self.first - self.start,
            seconds_per_token=per_token,
        )

    def _take(self, data: dict[str, Any]) -> None:
        for choice in data["choices"]:
            self.choices[choice["index"]].take(choice)
        self.usage = data.get("usage") or self.usage

    def _problem(self) -> str:
        body, choices = self.planned.body, self.choices.values()
        if self.planned.status != 200 and not self.planned.is_hostile:
            return f"status 200 instead of {self.planned.status}"
        if not self.is_done or any(choice.finish_reason is None for choice in choices):
            return "the reply is incomplete"
        if len(choices) != body.get("n", 1):
            return f"{len(choices)} choices instead of {body.get('n', 1)}"
        num_tokens = sum(choice.num_tokens for choice in choices)
        if self.usage is None or self.usage["completion_tokens"] != num_tokens:
            return f"{num_tokens} tokens, but usage is {self.usage}"
        if body.get("logprobs") and any(choice.num_logprobs != choice.num_tokens for choice in choices):
            return "the numbers of log-probabilities and tokens differ"
        if "tools" in body:
            return next(filter(None, map(_call_problem, choices)), "")
        if not self.planned.is_hostile and ("response_format" in body or "structured_outputs" in body):
            return next(filter(None, map(_json_problem, choices)), "")
        return ""


def _json_problem(choice: _Choice) -> str:
    """Returns what is wrong with a text that must follow the schema. Does not check texts that the token limit cut."""
    if choice.finish_reason != "stop":
        return ""
    try:
        is_right = set(json.loads(choice.text)) == set(SCHEMA["required"])
    except ValueError:
        is_right = False
    return "" if is_right else f"the text does not match the schema: {choice.text!r}"


def _call_problem(choice: _Choice) -> str:
    """Returns what is wrong with a tool call. Does not check calls that the token limit cut."""
    if choice.finish_reason != "tool_calls":
        return ""
    names = [tool["function"]["name"] for tool in TOOLS]
    try:
        is_right = choice.called in names and isinstance(json.loads(choice.arguments), dict)
    except ValueError:
        is_right = False
    return "" if is_right else f"the call is not one of {names}: {choice.called!r} {choice.arguments!r}"
