"""The anthropic package: messages, streams, tools, token counts."""

from anthropic import Anthropic
from checks import KEY, MODEL, Served, check, main

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def client(url: str) -> Anthropic:
    return Anthropic(base_url=url, api_key=KEY, max_retries=0)


@check("anthropic messages, streamed and whole")
def _(served: Served) -> None:
    ask = {"model": MODEL, "max_tokens": 12, "messages": HELLO, "extra_body": {"temperature": 0}}
    whole = client(served.url).messages.create(**ask).content[0].text
    with client(served.url).messages.stream(**ask) as stream:
        assert stream.get_final_text() == whole


@check("anthropic tools")
def _(served: Served) -> None:
    ask = {"model": MODEL, "max_tokens": 99, "tools": [TOOL]}
    reply = client(served.scripted_url).messages.create(messages=HELLO, **ask)
    use = next(block for block in reply.content if block.type == "tool_use")
    assert use.input == {"city": "Oslo"} and reply.stop_reason == "tool_use"
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "4"}]}
    turns = [*HELLO, {"role": "assistant", "content": reply.content}, result]
    assert "4 degrees" in client(served.scripted_url).messages.create(messages=turns, **ask).content[0].text


@check("anthropic count_tokens")
def _(served: Served) -> None:
    assert client(served.url).messages.count_tokens(model=MODEL, messages=HELLO).input_tokens > 0


main("anthropic")
