"""The requests of the soak test: valid ones of every kind, cancelled, invalid and repeated ones."""

import json
import random
from dataclasses import dataclass, replace
from typing import Any

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
_TEXT = (
    "attention window sink expert router token draft cache page prefix batch layer head query key value model server "
    "client stream reply prompt length seed schema queue memory thread river mountain garden window letter morning "
    "seven eleven forty quick brown lazy the of and to in is it that was for on are with as at be this have from or"
)
CORPUS = [_TEXT + ".\n", '{"name": "x", "count": 12, "color": "red"}\n', "0123456789 def add(a, b):\n"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "color": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "count", "color"],
    "additionalProperties": False,
}
_MAX_NEW_TOKENS, _JSON_TOKENS, _TOKENS_TO_CANCEL = 120, 200, 200
_NUM_PREFIXES, _PREFIX_WORDS = 4, 60
_HI = [{"role": "user", "content": "hi"}]
_MALFORMED: tuple[tuple[str, Any], ...] = (
    (CHAT, b'{"messages": [{"role": "user", "content": "hi"}'),
    (CHAT, b"\xff\xfe\x00"),
    (CHAT, b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}'),
    (CHAT, ["messages"]),
    (CHAT, {"max_tokens": 4}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": [{"role": "wizard", "content": "hi"}]}),
    (CHAT, {"messages": _HI, "temperature": "hot"}),
    (CHAT, {"messages": _HI, "response_format": {"type": "json_schema"}}),
    (CHAT, {"messages": _HI, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "star"}}}}),
    (CHAT, {"messages": _HI, "top_logprobs": 2}),
    (CHAT, {"messages": _HI, "stream": True, "n": 0}),
    (CHAT, {"messages": _HI, "color": "red"}),
    (COMPLETION, {"prompt": []}),
    (COMPLETION, {"prompt": "hi", "max_tokens": -1}),
    (COMPLETION, {"prompt": "hi", "stream_options": {"include_usage": True}}),
    (COMPLETION, {"prompt": [2**31 - 1]}),
    (COMPLETION, {"prompt": "hi", "stop": ""}),
)


@dataclass(frozen=True)
class Planned:
    """One request and its expected outcome.

    Attributes:
        path: Path of the API.
        body: JSON value, or bytes to send unchanged.
        status: Expected status.
        group: Replies of one group must be equal ("": no group).
        cancel_after_events: Number of stream events after which the client disconnects.
        cancel_after_seconds: Time after which the client disconnects.
        error_code: Expected code of an error (None: any).
    """

    path: str
    body: Any
    status: int = 200
    group: str = ""
    cancel_after_events: int | None = None
    cancel_after_seconds: float | None = None
    error_code: str | None = None

    @property
    def streams(self) -> bool:
        """Whether the reply is a stream of events."""
        return isinstance(self.body, dict) and bool(self.body.get("stream"))

    @property
    def is_cancelled(self) -> bool:
        """Whether the client disconnects before the end of the reply."""
        return self.cancel_after_events is not None or self.cancel_after_seconds is not None

    @property
    def content(self) -> bytes:
        """The request body."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def plan_load(num_requests: int, *, model_name: str, positions: int, seed: int = 0) -> list[Planned]:
    """Returns the requests in the order in which they are sent, a pure function of the arguments.

    One tenth is malformed, one tenth is cancelled, and one tenth (at least 10) repeats a few requests with a seed. One
    in fifty has a prompt longer than the model's `positions`. One in a hundred names an unknown model.
    """
    draw = random.Random(seed)
    prefixes = [_words(draw, _PREFIX_WORDS) for _ in range(_NUM_PREFIXES)]
    tenth, few = max(num_requests // 10, 1), max(num_requests // 50, 2)
    load = [Planned(*_MALFORMED[index % len(_MALFORMED)], status=400) for index in range(tenth)]
    load += [_cancelled(draw, prefixes) for _ in range(tenth)]
    load += _repeated(draw, prefixes, max(tenth, 10))
    load += [_too_long(index, positions) for index in range(few)]
    unknown = {"model": "no-such-model", "messages": _HI}
    load += [Planned(CHAT, unknown, status=404, error_code="model_not_found")] * max(num_requests // 100, 1)
    load += [_good(draw, prefixes) for _ in range(num_requests - len(load))]
    draw.shuffle(load)
    return [_for_model(planned, model_name) for planned in load]


def long_stream(model_name: str, num_tokens: int) -> Planned:
    """Returns a streamed request of exactly `num_tokens` new tokens."""
    body = {"model": model_name, "prompt": "the", "max_tokens": num_tokens, "ignore_eos": True}
    return _shown(Planned(COMPLETION, body | {"stream": True}))


def warm_up(model_name: str) -> list[Planned]:
    """Returns requests that make the server load everything that it loads on demand."""
    asked = {"model": model_name, "max_tokens": 8}
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    return [
        _shown(Planned(CHAT, asked | {"messages": _HI, "response_format": form})),
        _shown(Planned(COMPLETION, asked | {"prompt": "the", "logprobs": 2, "stream": True})),
    ]


def _good(draw: random.Random, prefixes: list[str]) -> Planned:
    body: dict[str, Any] = {
        "max_tokens": draw.randint(4, _MAX_NEW_TOKENS),
        "temperature": draw.choice([0.0, 0.7, 1.0]),
        "stream": draw.random() < 0.5,
    }
    if draw.random() < 0.3:
        body["seed"] = draw.randrange(2**31)
    if draw.random() < 0.1:
        body["n"] = 2
    if draw.random() < 0.2:
        body |= draw.choice([{"top_p": 0.9}, {"top_k": 40}, {"frequency_penalty": 0.5}, {"stop": ["zz", "window"]}])
    path = draw.choice([CHAT, COMPLETION])
    if draw.random() < 0.2:
        body |= {"logprobs": True, "top_logprobs": 3} if path == CHAT else {"logprobs": 3}
    if draw.random() < 0.1:
        body |= _json_fields(path)
    return _shown(Planned(path, body | _prompt(draw, prefixes, path)))


def _cancelled(draw: random.Random, prefixes: list[str]) -> Planned:
    """Returns a long request that the client cancels; three in four are streams, cancelled after a few events."""
    path = draw.choice([CHAT, COMPLETION])
    body = {"max_tokens": _TOKENS_TO_CANCEL, "ignore_eos": True} | _prompt(draw, prefixes, path)
    if draw.random() < 0.25:
        return _shown(Planned(path, body, cancel_after_seconds=draw.uniform(0.02, 0.5)))
    return _shown(Planned(path, body | {"stream": True}, cancel_after_events=draw.randint(1, 12)))


def _repeated(draw: random.Random, prefixes: list[str], count: int) -> list[Planned]:
    """Returns repetitions of a few requests with seeds, half of them as streams."""
    chat, completion = _prompt(draw, prefixes, CHAT), _prompt(draw, prefixes, COMPLETION)
    originals = [
        Planned(CHAT, chat | {"max_tokens": 60, "seed": 1}, group="chat"),
        Planned(COMPLETION, completion | {"max_tokens": 60, "seed": 2}, group="completion"),
        Planned(COMPLETION, completion | {"max_tokens": 60, "temperature": 0.0}, group="greedy completion"),
        Planned(CHAT, chat | {"max_tokens": 40, "seed": 3, "n": 2}, group="chat, n 2"),
        Planned(CHAT, chat | _json_fields(CHAT) | {"seed": 4}, group="chat, JSON"),
    ]
    load = []
    for index in range(count):
        original = originals[index % len(originals)]
        streams = index // len(originals) % 2 == 1
        load.append(_shown(replace(original, body=original.body | {"stream": streams})))
    return load


def _too_long(index: int, positions: int) -> Planned:
    """Returns a request with a prompt of digits, each of which is one token."""
    digits = "7" * (positions + index)
    code = "context_length_exceeded"
    if index % 2:
        return Planned(COMPLETION, {"prompt": digits, "stream": True}, status=400, error_code=code)
    return Planned(CHAT, {"messages": [{"role": "user", "content": digits}]}, status=400, error_code=code)


def _json_fields(path: str) -> dict[str, Any]:
    if path == CHAT:
        form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
        return {"max_tokens": _JSON_TOKENS, "response_format": form}
    return {"max_tokens": _JSON_TOKENS, "structured_outputs": {"json": SCHEMA}}


def _prompt(draw: random.Random, prefixes: list[str], path: str) -> dict[str, Any]:
    """Returns the fields of a prompt with one of the shared prefixes and an individual end."""
    prefix, question = draw.choice(prefixes), _words(draw, draw.randint(2, 60))
    if path == COMPLETION:
        return {"prompt": f"{prefix} {question}"}
    return {"messages": [{"role": "system", "content": prefix}, {"role": "user", "content": question}]}


def _shown(planned: Planned) -> Planned:
    """Adds the fields that request token ids and usage, which clients measure and validate."""
    fields: dict[str, Any] = {"return_token_ids": True}
    if planned.streams:
        fields["stream_options"] = {"include_usage": True}
    return replace(planned, body=planned.body | fields)


def _for_model(planned: Planned, model_name: str) -> Planned:
    if not isinstance(planned.body, dict):
        return planned
    return replace(planned, body={"model": model_name} | planned.body)


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(_TEXT.split(), k=count))
