"""The requests of the soak test: valid ones of every kind, cancelled, cut off, invalid, hostile and repeated ones."""

import json
import random
from dataclasses import dataclass, replace
from typing import Any, Literal

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
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks things up.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
    for name in ("weather", "distance")
]
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
    (COMPLETION, {"prompt": []}),
    (COMPLETION, {"prompt": "hi", "max_tokens": -1}),
    (COMPLETION, {"prompt": "hi", "stream_options": {"include_usage": True}}),
    (COMPLETION, {"prompt": [2**31 - 1]}),
    (COMPLETION, {"prompt": "hi", "stop": ""}),
)
_DEEP: dict[str, Any] = {"type": "string"}
for _ in range(40):
    _DEEP = {"type": "array", "items": _DEEP}
# Structures that a server may refuse or serve, but that must not stop it.
_HOSTILE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("json", {"$ref": "#"}),
    ("json", {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}),
    ("json", {"type": "integer", "minimum": 9, "maximum": 1}),
    ("json", {"enum": []}),
    ("json", {"type": "string", "pattern": "(a+)+$" * 20}),
    ("json", {"type": "string", "minLength": 10**9}),
    ("json", {"type": "array", "items": {"type": "integer"}, "minItems": 10**6, "maxItems": 10**7}),
    ("json", {"allOf": [{"type": "string"}, {"type": "integer"}]}),
    ("json", {"type": "object", "patternProperties": {"(": {}}}),
    ("json", {"not": {}}),
    ("json", _DEEP),
    ("regex", "(" * 200 + ")" * 200),
    ("regex", "[a-z]{1,100000}"),
    ("regex", "(?=look)ahead"),
    ("grammar", "start: start"),
    ("grammar", 'start: "a" start | start start'),
    ("grammar", "start: /[/"),
    ("choice", ["a" * 5000, "b"]),
    ("choice", ["\u0000", "\ud7ff"]),
)


@dataclass(frozen=True)
class Planned:
    """One request and its expected outcome.

    Attributes:
        path: Path of the API.
        body: JSON value, or bytes to send unchanged.
        status: Expected status.
        kind: Kind of the request, for the report.
        group: Replies of one group must be equal ("": no group).
        cancel_after_events: Number of stream events after which the client disconnects.
        cancel_after_seconds: Time after which the client disconnects.
        cut: Where the client breaks the connection: within the request, after it without reading, or within the reply.
        later_turns: Texts of the user that follow the reply, in the same session.
        is_hostile: Whether the server may serve the request or refuse it with a 400.
        error_code: Expected code of an error (None: any).
    """

    path: str
    body: Any
    status: int = 200
    kind: str = ""
    group: str = ""
    cancel_after_events: int | None = None
    cancel_after_seconds: float | None = None
    error_code: str | None = None
    cut: Literal["", "request", "after", "reply"] = ""
    later_turns: tuple[str, ...] = ()
    is_hostile: bool = False

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

    Of 100 requests, 5 demand JSON, 5 have tools, 4 begin a conversation of three turns in a session, 5 have a prompt of
    up to half of the model's `positions`, 8 are cancelled, 4 break the connection, 6 are malformed, 4 have a structure
    that is hard to compile, 8 (at least 10 in all) repeat a few requests with a seed, 2 have a prompt longer than
    `positions`, and 1 names an unknown model. The others are valid requests with various options.
    """
    draw = random.Random(seed)
    prefixes = [_words(draw, _PREFIX_WORDS) for _ in range(_NUM_PREFIXES)]

    def share(percent: int, least: int = 1) -> range:
        return range(max(num_requests * percent // 100, least))

    load = [Planned(*_MALFORMED[index % len(_MALFORMED)], status=400, kind="malformed") for index in share(6)]
    load += [_hostile(index) for index in share(4)]
    load += [_cancelled(draw, prefixes) for _ in share(8)]
    load += [_cut(draw, prefixes, index) for index in share(4)]
    load += _repeated(draw, prefixes, len(share(8, least=10)))
    load += [_too_long(index, positions) for index in share(2, least=2)]
    unknown = {"model": "no-such-model", "messages": _HI}
    load += [Planned(CHAT, unknown, 404, "unknown model", error_code="model_not_found") for _ in share(1)]
    load += [_form(draw, prefixes) for _ in share(5)]
    load += [_tools(draw, prefixes, index) for index in share(5)]
    load += [_conversation(draw, prefixes, index) for index in share(4)]
    load += [_long(draw, positions) for _ in share(5)]
    load += [_good(draw, prefixes) for _ in range(num_requests - len(load))]
    draw.shuffle(load)
    return [_for_model(planned, model_name) for planned in load]


def next_turn(planned: Planned, reply: str) -> Planned:
    """Returns the request that continues a conversation after a reply."""
    text, *rest = planned.later_turns
    messages = [
        *planned.body["messages"],
        {"role": "assistant", "content": reply},
        {"role": "user", "content": text},
    ]
    return replace(planned, body=planned.body | {"messages": messages}, later_turns=tuple(rest))


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
    return _shown(Planned(path, body | _prompt(draw, prefixes, path), kind="plain"))


def _form(draw: random.Random, prefixes: list[str]) -> Planned:
    path = draw.choice([CHAT, COMPLETION])
    body = _json_fields(path) | {"temperature": draw.choice([0.0, 1.0]), "stream": draw.random() < 0.5}
    return _shown(Planned(path, body | _prompt(draw, prefixes, path), kind="JSON"))


def _tools(draw: random.Random, prefixes: list[str], index: int) -> Planned:
    named = {"type": "function", "function": {"name": "distance"}}
    body = {
        "tools": TOOLS,
        "tool_choice": ("auto", "required", named)[index % 3],
        "max_tokens": _MAX_NEW_TOKENS,
        "stream": draw.random() < 0.5,
    }
    return _shown(Planned(CHAT, body | _prompt(draw, prefixes, CHAT), kind="tools"))


def _conversation(draw: random.Random, prefixes: list[str], index: int) -> Planned:
    """Returns the first turn of a conversation in a session of its own."""
    turns = tuple(_words(draw, draw.randint(2, 30)) for _ in range(2))
    body = {"max_tokens": draw.randint(4, 40), "session": f"session {index}", "stream": draw.random() < 0.5}
    return _shown(Planned(CHAT, body | _prompt(draw, prefixes, CHAT), kind="session", later_turns=turns))


def _long(draw: random.Random, positions: int) -> Planned:
    """Returns a request with a prompt of digits, each of which is one token."""
    digits = "".join(draw.choices("0123456789", k=draw.randint(positions // 8, positions // 2)))
    body = {"prompt": digits, "max_tokens": draw.randint(4, 40), "stream": draw.random() < 0.5}
    return _shown(Planned(COMPLETION, body, kind="long prompt"))


def _hostile(index: int) -> Planned:
    name, value = _HOSTILE[index % len(_HOSTILE)]
    body = {"prompt": "the", "max_tokens": 20, "structured_outputs": {name: value}}
    return _shown(Planned(COMPLETION, body, kind="hostile structure", is_hostile=True))


def _cut(draw: random.Random, prefixes: list[str], index: int) -> Planned:
    path, where = draw.choice([CHAT, COMPLETION]), ("request", "after", "reply")[index % 3]
    body = {"max_tokens": _TOKENS_TO_CANCEL, "ignore_eos": True, "stream": where == "reply"}
    return _shown(Planned(path, body | _prompt(draw, prefixes, path), kind="broken connection", cut=where))


def _cancelled(draw: random.Random, prefixes: list[str]) -> Planned:
    """Returns a long request that the client cancels; three in four are streams, cancelled after a few events."""
    path = draw.choice([CHAT, COMPLETION])
    body = {"max_tokens": _TOKENS_TO_CANCEL, "ignore_eos": True} | _prompt(draw, prefixes, path)
    if draw.random() < 0.25:
        return _shown(Planned(path, body, kind="cancelled", cancel_after_seconds=draw.uniform(0.02, 0.5)))
    return _shown(Planned(path, body | {"stream": True}, kind="cancelled", cancel_after_events=draw.randint(1, 12)))


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
        load.append(_shown(replace(original, kind="repeated", body=original.body | {"stream": streams})))
    return load


def _too_long(index: int, positions: int) -> Planned:
    """Returns a request with a prompt of digits, each of which is one token."""
    digits = "7" * (positions + index)
    code = "context_length_exceeded"
    if index % 2:
        return Planned(COMPLETION, {"prompt": digits, "stream": True}, 400, "too long", error_code=code)
    return Planned(CHAT, {"messages": [{"role": "user", "content": digits}]}, 400, "too long", error_code=code)


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
