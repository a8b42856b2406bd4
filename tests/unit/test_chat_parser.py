"""The chat parser loses no text, gives the same result for any pieces, streams arguments, and inverts the template."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmimo.core.records import Message
from openmimo.data.chat.parser import (
    ChatEvent,
    ChatParser,
    ContentText,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from openmimo.data.chat.template import encode_chat, render
from openmimo.data.tokenizer import Tokenizer

PROPERTIES = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "share": {"type": "number"},
    "flag": {"type": "boolean"},
    "items": {"type": "array"},
    "options": {"type": "object"},
    "nothing": {"type": "null"},
    "maybe": {"type": ["string", "null"]},
    "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    "unit": {"enum": ["celsius", "1"]},
    "city": {"$ref": "#/$defs/City"},
    "loop": {"$ref": "#/$defs/Loop"},
    "silent": {},
}
DEFINITIONS = {"City": {"type": "string"}, "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}] * 9}}
SCHEMA = {"type": "object", "properties": PROPERTIES, "$defs": DEFINITIONS}
TOOLS = [{"type": "function", "function": {"name": "act", "parameters": SCHEMA}}]
QUICK = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def parse(pieces, *, starts_thinking: bool = False) -> list[ChatEvent]:
    """Returns the events of a reply that arrives in pieces, with adjacent events merged."""
    parser = ChatParser(tools=TOOLS, starts_thinking=starts_thinking)
    merged = []
    for event in [one for piece in pieces for one in parser.push(piece)] + parser.finish():
        if merged and type(event) is type(merged[-1]) and not isinstance(event, ToolCallStart | ToolCallEnd):
            merged[-1] = replace(event, text=merged[-1].text + event.text)
        else:
            merged.append(event)
    return merged


def call(*parameters: tuple[str, str], name: str = "act") -> str:
    """A call as the template writes it."""
    lines = "".join(f"<parameter={parameter}>{value}</parameter>\n" for parameter, value in parameters)
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


def called(arguments: str, *, index: int = 0, name: str = "act") -> list[ChatEvent]:
    """The events of a whole call."""
    return [ToolCallStart(index, name), ToolCallArguments(index, arguments), ToolCallEnd(index)]


def value_of(parameter: str, text: str):
    """The parsed value of an argument."""
    arguments = parse([call((parameter, text))])[1].text
    return json.loads(arguments)[parameter]


# --- structure of a reply --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "events"),
    [
        ("", []),
        ("hello", [ContentText("hello")]),
        ("<think>why</think>\n\nso", [ReasoningText("why"), ContentText("\n\nso")]),
        ("<think></think>so", [ContentText("so")]),
        ("a<think>b</think>c", [ContentText("a"), ReasoningText("b"), ContentText("c")]),
        ("<think>why", [ReasoningText("why")]),
        ("<think>a<think>b</think>c</think>", [ReasoningText("a<think>b"), ContentText("c</think>")]),
        (call(), called("{}")),
        (call(("text", "hi"), ("count", "3")), called('{"text": "hi", "count": 3}')),
        (f"a{call()}{call()}b", [ContentText("a"), *called("{}"), *called("{}", index=1), ContentText("b")]),
        (f"{call()}\n{call()}", [*called("{}"), ContentText("\n"), *called("{}", index=1)]),
        (f"<think>a{call()}b</think>c", [ReasoningText("a"), *called("{}"), ReasoningText("b"), ContentText("c")]),
        (call(("x", "1"), name="other"), called('{"x": 1}', name="other")),
        ("<tool_call><function=act></function></tool_call>", called("{}")),
        (
            "<tool_call>\n<function=a>\n</function>\n<function=b>\n</function>\n</tool_call>",
            [*called("{}", name="a"), *called("{}", index=1, name="b")],
        ),
    ],
)
def test_the_parts_of_a_reply(reply, events):
    assert parse([reply]) == parse(reply) == events


def test_a_reply_may_begin_in_thought():
    assert parse(["why</think>so"], starts_thinking=True) == [ReasoningText("why"), ContentText("so")]
    assert parse(["why</think>so"]) == [ContentText("why</think>so")]


@pytest.mark.parametrize(
    "reply",
    [
        "a < b, a<b, <", "\u2028\x00<", "<thin", "<thinking>", "<tool_call>", "<tool_call>\n", "<tool_call>\n<function",
        "<tool_call>\n<function=act", "<tool_call>\n<function=>\n</function>\n</tool_call>", "<tool_call></tool_call>",
        "<tool_call> is the mark of a call", '<tool_call>\n{"name": "act"}\n</tool_call>', "</function>",
        "<function=act>\n</function>", "<parameter=a>1</parameter>", "</think>", "</tool_call>",
        "<tool_call><tool_call>x", "<tool_call>\n</think>", "<tool_call>\n<function=a\nb>",
        f"<tool_call>\n<function={'n' * 257}>\n</function>\n</tool_call>",
    ],
)  # fmt: skip
def test_what_is_no_markup_is_text(reply):
    assert parse([reply]) == parse(reply) == [ContentText(reply)]
    text = reply.replace("</think>", "")
    assert parse(text, starts_thinking=True) == ([ReasoningText(text)] if text else [])


@pytest.mark.parametrize(
    ("inside", "arguments", "after"),
    [
        ("\nhello\n<parameter=text>a</parameter>\n", '{"text": "a"}', "\nhello\n"),
        ("<parameter=text>a</parameter>\nb </parameter>\n", '{"text": "a"}', "\nb </parameter>\n"),
        (
            "<parameter=text>a</parameter><parameter=text>b</parameter>",
            '{"text": "a"}',
            "<parameter=text>b</parameter>",
        ),
        ("<function=other>", "{}", "<function=other>"),
    ],
)
def test_text_between_parameters_comes_after_the_call(inside, arguments, after):
    reply = f"<tool_call>\n<function=act>{inside}</function>\n</tool_call>."
    assert parse([reply]) == parse(reply) == [*called(arguments), ContentText(f"{after}.")]


@pytest.mark.parametrize(
    ("end", "after"),
    [
        ("</tool_call>b", [ContentText("b")]),
        ("</function>b", [ContentText("b")]),
        ("</function>\n", [ContentText("\n")]),
        ("</function>\n</tool_", [ContentText("\n")]),
        (call(), called("{}", index=1)),
        (f"</function>{call()}", called("{}", index=1)),
        ("<think>b", [ReasoningText("b")]),
        ("x<think>b", [ContentText("x"), ReasoningText("b")]),
    ],
)
def test_a_call_ends_where_its_end_is_missing(end, after):
    reply = f"<tool_call>\n<function=act>\n<parameter=count>1</parameter>{end}"
    assert parse([reply]) == parse(reply) == [*called('{"count": 1}'), *after]


def test_a_call_in_thought_ends_with_the_thought():
    reply = "<think>a<tool_call>\n<function=act>\nb</think>c"
    assert parse(reply) == [ReasoningText("a"), *called("{}"), ReasoningText("\nb"), ContentText("c")]


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        ("", "{"),
        ("<parameter=text>one\ntw", '{"text": "one\\ntw'),
        ("<parameter=text>a</para", '{"text": "a'),
        ("<parameter=text>a\n</function>\n", '{"text": "a'),
        ("<parameter=text>a\n<tool_call>", '{"text": "a'),
        ("\n<parameter=te", "{"),
        ("<parameter=items>[1, 2", '{"items": [1, 2'),
        ("<parameter=text>a</parameter>\n<parameter=maybe>nul", '{"text": "a", "maybe": nul'),
        ("<parameter=text>a</parameter>\n", '{"text": "a"'),
    ],
)
def test_a_call_cut_off_by_the_end_is_left_open(inside, arguments):
    events = parse(f"<tool_call>\n<function=act>\n{inside}")
    assert events == [ToolCallStart(0, "act"), ToolCallArguments(0, arguments)]
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)


def test_a_call_cut_off_by_the_end_loses_no_text():
    events = parse("<tool_call>\n<function=act>\nhello <param")
    assert events == [ToolCallStart(0, "act"), ToolCallArguments(0, "{"), ContentText("\nhello ")]


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        ("<parameter=city>Oslo\n<parameter=count>3</parameter>\n", '{"city": "Oslo", "count": 3}'),
        ("<parameter=count>3\n<parameter=city>Oslo</parameter>\n", '{"count": 3, "city": "Oslo"}'),
        ("<parameter=city>\n<parameter=text>\n<parameter=count>3\n", '{"city": "", "text": "", "count": 3}'),
        ("<parameter=city>Oslo\n", '{"city": "Oslo"}'),
        ("<parameter=city>Oslo", '{"city": "Oslo"}'),
        ("<parameter=city>Oslo</function>\n", '{"city": "Oslo"}'),
        ("<parameter=city>two\nlines\n\n", '{"city": "two\\nlines\\n"}'),
        ("<parameter=text>a\n<parameter=nope>b</parameter>\n", '{"text": "a\\n<parameter=nope>b"}'),
        (
            "<parameter=text>a </function> b\n<parameter=count>1</parameter>\n",
            '{"text": "a </function> b", "count": 1}',
        ),
    ],
)
def test_a_missing_end_of_a_value_swallows_neither_parameter_nor_call(inside, arguments):
    first = f"<tool_call>\n<function=act>\n{inside}</function>\n</tool_call>"
    assert parse([first]) == parse(first) == called(arguments)
    reply = f"{first}{call(('text', 'hi'))}"
    assert parse([reply]) == parse(reply) == [*called(arguments), *called('{"text": "hi"}', index=1)]


@pytest.mark.parametrize("end", ["", "</tool_call>", "\n</tool_call>\n", "\n</function>\n"])
def test_a_call_without_any_end_does_not_swallow_the_next(end):
    reply = f"<tool_call>\n<function=act>\n<parameter=city>Oslo{end}{call(('city', 'Rome'))}"
    events = [event for event in parse([reply]) if not isinstance(event, ContentText)]
    assert events == [*called('{"city": "Oslo"}'), *called('{"city": "Rome"}', index=1)]
    assert parse([reply]) == parse(reply)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "\n a \n", "null", "5", '"', '"quoted"', "\\n", "two\nlines\ttab", "日本 é 😀 \u2028 \x00", "{}", "[1",
        "</", "</parameter", "</param>eter>", "</function>\n</tool_call>", call(), "<parameter=text>",
    ],
)  # fmt: skip
def test_a_string_is_taken_as_it_is(text):
    text = text.replace("</parameter>", "")
    for parameter in ("text", "city", "unit"):
        assert value_of(parameter, text) == text


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [
        ("count", "5", 5),
        ("count", " 5\n", 5),
        ("count", "five", "five"),
        ("count", "", ""),
        ("count", "5 apples", "5 apples"),
        ("count", '"5"', "5"),
        ("share", "-1.5e3", -1500.0),
        ("share", "NaN", "NaN"),
        ("share", "-Infinity", "-Infinity"),
        ("share", "1" * 5000, "1" * 5000),
        ("flag", "true", True),
        ("flag", "True", "True"),
        ("items", '["a", {"b": null}]', ["a", {"b": None}]),
        ("items", "[1, 2", "[1, 2"),
        ("items", "[" * 50000, "[" * 50000),
        ("options", '{"a": "</x>"}', {"a": "</x>"}),
        ("nothing", "null", None),
        ("maybe", "null", None),
        ("maybe", "nullable", "nullable"),
        ("maybe", "5", "5"),
        ("either", "5", 5),
        ("either", "null", "null"),
        ("either", "5th", "5th"),
    ],
)
def test_a_value_of_another_type_is_json_if_it_can_be(parameter, text, value):
    assert value_of(parameter, text) == value


@pytest.mark.parametrize("parameter", ["silent", "loop", "unheard_of"])
def test_where_the_schema_is_silent_json_wins_over_a_string(parameter):
    for text, value in (("5", 5), ("[]", []), ("null", None), ("true", True), ('{"a": 1}', {"a": 1})):
        assert value_of(parameter, text) == value
    for text in ("", "truth", '"5"', "{a}", "hello", "- a"):
        assert value_of(parameter, text) == text


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "act"},
        {"name": "act", "parameters": SCHEMA},
        *(
            {"type": "function", "function": {"name": "act", "parameters": parameters}}
            for parameters in (
                None, True, [], {"properties": []}, {"properties": {"text": 5}}, {"properties": {"text": {"type": 5}}},
                {"properties": {"text": {"type": "wizard"}}}, {"properties": {"text": {"$ref": "#/no/where"}}},
                {"properties": {"text": {"anyOf": [5, {}]}}}, {"properties": {"text": {"enum": [[], {}, 1.5]}}},
            )
        ),
    ],
)  # fmt: skip
def test_schemas_that_say_little_do_no_harm(tool):
    parser = ChatParser(tools=[tool])
    assert parser.push(call(("text", "hi"))) == called('{"text": "hi"}')


def test_arguments_grow_as_they_come():
    parser = ChatParser(tools=TOOLS)
    parser.push("<tool_call>\n<function=act>\n<parameter=text>")
    grown = [event.text for word in ("one ", 'two "', "three\n") for event in parser.push(word)]
    assert grown == ['"one ', 'two \\"', "three"]  # a line end is held back until the next text
    for parameter in ("maybe", "either", "count", "unheard_of"):
        parser = ChatParser(tools=TOOLS)
        parser.push(f"<tool_call>\n<function=act>\n<parameter={parameter}>")
        assert parser.push("hello") == [ToolCallArguments(0, '"hello')]


def test_text_is_held_back_no_longer_than_it_may_be_a_mark():
    parser = ChatParser()
    assert parser.push("a <") == [ContentText("a ")]
    assert parser.push("t") == []
    assert parser.push("d>") == [ContentText("<td>")]
    assert parser.push("<function=" + "n" * 257) == [ContentText("<function=" + "n" * 257)]
    assert parser.push("<tool_call>\n") == []
    assert parser.push("so") == [ContentText("<tool_call>\nso")]


# --- arbitrary text --------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=act>", "<function=", "</function>", "\n", " ",
        "<", "<parameter=text>", "<parameter=count>", "<parameter=silent>", "</parameter>", "</", ">", "a", "5", "null",
        "[", "]", '"', "\\", "é", "😀",
    ]
) | st.text(max_size=4)  # fmt: skip
REPLIES = st.lists(PIECES, max_size=30).map("".join)


@QUICK
@given(reply=REPLIES, starts_thinking=st.booleans(), data=st.data())
def test_cuts_do_not_matter(reply, starts_thinking, data):
    places = data.draw(st.lists(st.integers(0, len(reply)), max_size=8).map(sorted))
    pieces = [reply[start:end] for start, end in zip([0, *places], [*places, len(reply)], strict=True)]
    events = parse([reply], starts_thinking=starts_thinking)
    assert parse(pieces, starts_thinking=starts_thinking) == events
    assert parse(reply, starts_thinking=starts_thinking) == events


@QUICK
@given(reply=REPLIES)
def test_calls_that_ended_have_an_object_of_arguments_and_are_not_mixed_with_text(reply):
    running, arguments, num_calls = False, "", 0
    for event in parse(reply):
        match event:
            case ToolCallStart():
                assert not running and event.index == num_calls
                running, arguments, num_calls = True, "", num_calls + 1
            case ToolCallArguments():
                assert running and event.index == num_calls - 1
                arguments += event.text
            case ToolCallEnd():
                assert running and event.index == num_calls - 1
                assert isinstance(json.loads(arguments), dict)
                running = False


@QUICK
@given(words=st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "a", "<b>", "\n", "</"]) | st.text()))
def test_without_calls_nothing_but_thinking_marks_is_left_out(words):
    is_thinking, said = False, {True: "", False: ""}
    for word in words:
        if word == ("</think>" if is_thinking else "<think>"):
            is_thinking = not is_thinking
        else:
            said[is_thinking] += word
    events = parse(["".join(words)])
    assert "".join(event.text for event in events if isinstance(event, ReasoningText)) == said[True]
    assert "".join(event.text for event in events if isinstance(event, ContentText)) == said[False]


@QUICK
@given(texts=st.lists(st.text(alphabet="ab<>/\n=é"), min_size=1, max_size=4))
def test_text_around_calls_is_kept(texts):
    events = parse([call(("count", "1")).join(texts)])
    kept, calls = [""], 0
    for event in events:
        if isinstance(event, ContentText):
            kept[-1] += event.text
        elif isinstance(event, ToolCallEnd):
            calls += 1
            kept.append("")
    assert (kept, calls) == (texts, len(texts) - 1)


@pytest.mark.parametrize(
    "reply",
    [
        "word " * 10000,
        "<" * 50000,
        "<tool_call>" + " " * 50000,
        "<function=" * 5000,
        "<tool_call>\n<function=act>" + " a" * 25000,
        "<tool_call>\n<function=act><parameter=text>" + "</paramete" * 5000,
        "<tool_call>\n<function=act><parameter=items>" + " " * 25000 + "[" * 25000,
        call(("text", "x")) * 1000,
    ],
    ids=lambda reply: reply[:50],
)
def test_long_replies_in_small_pieces(reply):
    """A parser that reads the whole reply again for each piece would take minutes."""
    parser = ChatParser(tools=TOOLS)
    grown = [event for character in reply for event in parser.push(character)] + parser.finish()
    assert text_of(grown) == text_of(parse([reply]))


def text_of(events: list[ChatEvent]) -> str:
    """Joins the text of all events."""
    return "".join(event.text for event in events if not isinstance(event, ToolCallStart | ToolCallEnd))


# --- round trips through the template --------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "</parameter>" not in text)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXTS | st.sampled_from(["null", "5", "true", "<tool_call>\n", "</", "</function>\n</tool_call>"]),
        "count": st.integers(),
        "share": NUMBERS,
        "flag": st.booleans(),
        "items": st.lists(JSON, max_size=3).filter(lambda value: "</parameter>" not in json.dumps(value)),
        "options": st.dictionaries(TEXTS, JSON, max_size=3),
        "nothing": st.none(),
        "maybe": st.none() | TEXTS.filter(lambda text: text.strip() != "null"),
    },
)
CALLS = st.lists(ARGUMENTS.map(lambda arguments: {"name": "act", "arguments": arguments}), max_size=3)


def is_free_of_marks(text: str) -> bool:
    return "<" not in text


def reply_of(turn: Message) -> str:
    """Returns the text of an assistant's turn in the template, as a model would write it."""
    text = render([Message("user", "?"), turn], tools=TOOLS, add_generation_prompt=False)
    return text.partition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>")


def turn_of(events: list[ChatEvent]) -> Message:
    """Builds the turn that the events describe."""
    said = {ReasoningText: "", ContentText: ""}
    calls: list[dict] = []
    for event in events:
        match event:
            case ReasoningText() | ContentText():
                said[type(event)] += event.text
            case ToolCallStart():
                calls.append({"name": event.name, "arguments": ""})
            case ToolCallArguments():
                calls[event.index]["arguments"] += event.text
            case ToolCallEnd():
                calls[event.index]["arguments"] = json.loads(calls[event.index]["arguments"])
    return Message("assistant", said[ContentText], said[ReasoningText], tuple(calls))


@QUICK
@given(reasoning=TEXTS.filter(is_free_of_marks), content=TEXTS.filter(is_free_of_marks), calls=CALLS)
def test_a_rendered_turn_comes_back(reasoning, content, calls):
    turn = Message("assistant", content, reasoning, tuple(calls))
    assert turn_of(parse([reply_of(turn)])) == turn


def test_a_tokenized_turn_comes_back_from_any_cut_of_its_tokens():
    tokenizer = Tokenizer.train(["def add(a, b):\n    return a + b\n"], vocab_size=300)
    arguments = {"text": "日本 'é'\n<think> </function>", "items": [1, {"a": "b\n"}], "maybe": None, "flag": False}
    calls = ({"name": "act", "arguments": arguments}, {"name": "now", "arguments": {}})
    turn = Message("assistant", "Looking.", "I must look.", calls)
    prompt = encode_chat(tokenizer, [Message("user", "?")], tools=TOOLS, enable_thinking=True)
    ids = encode_chat(tokenizer, [Message("user", "?"), turn], tools=TOOLS, add_generation_prompt=False)
    text = tokenizer.decode(ids[len(prompt) : -1], skip_special=False)
    assert turn_of(parse([text])) == turn_of(parse(text)) == turn


def test_where_no_call_may_come_its_markup_is_text():
    parser = ChatParser(reads_calls=False)
    text = "<think>a</think>b <tool_call>\n<function=f>\n</function>\n</tool_call>"
    events = [event for piece in (text[:30], text[30:]) for event in parser.push(piece)] + parser.finish()
    assert {type(event).__name__ for event in events} == {"ReasoningText", "ContentText"}
    said = "".join(event.text for event in events if type(event).__name__ == "ContentText")
    assert said == text.removeprefix("<think>a</think>")
