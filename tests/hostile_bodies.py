"""Request bodies that a server must refuse or answer at little cost, by name: a path, and the body's bytes."""

import base64
import json

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COMPACT = "/v1/messages", "/v1/responses/compact"
_SIZE = 4 * 2**20 - 4096  # just below the default limit


def _filled(head: str, one: str, tail: str) -> bytes:
    """Valid JSON of nearly the largest size: `one` over and over, between head and tail."""
    return (head + ",".join([one] * (_SIZE // (len(one) + 1))) + tail).encode()


def _text(part: str) -> str:
    return part * (_SIZE // len(json.dumps(part, ensure_ascii=False).encode()[1:-1]))


def _dumped(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _chat(**fields) -> dict:
    return {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, **fields}


def _tool(number: int, parameters: dict) -> dict:
    return {"type": "function", "function": {"name": f"f{number}", "parameters": parameters}}


def _nested(depth: int, wrap) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = wrap(schema)
    return schema


def _chained(number: int, link) -> dict:
    return {"$ref": "#/$defs/d0", "$defs": {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(number)}}


def _form(schema: dict) -> dict:
    return _chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}})


def _completion(prompt, **fields) -> dict:
    return {"prompt": prompt, "max_tokens": 1, **fields}


def _message(content) -> dict:
    return {"model": "checkpoint0", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}


def _sealed(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "openmimo1." + base64.urlsafe_b64encode(text.encode()).decode()


_MANY_UNKNOWN = {f"x{i}": 1 for i in range(120_000)}
_PARTS = [{"type": "text", "text": "x"}] * 30_000
_WRONG_PARTS = [{"type": "text", "text": 1}] * 30_000
_MANY_TOOLS = [_tool(i, {}) for i in range(18_000)]
_WIDE = {"properties": {f"p{i}": {"type": "string"} for i in range(60_000)}}

HOSTILE: dict[str, tuple[str, bytes]] = {
    "nulls as prompts": (COMPLETIONS, _filled('{"prompt":[', "null", "]}")),
    "ids as a prompt": (COMPLETIONS, _filled('{"prompt":[', "1", "]}")),
    "as many ids as are counted": (COMPLETIONS, _dumped(_completion([7] * 520_000))),
    "empty texts as prompts": (COMPLETIONS, _filled('{"prompt":[', '""', "]}")),
    "empty lists as prompts": (COMPLETIONS, _filled('{"prompt":[', "[]", "]}")),
    "ids and a text": (COMPLETIONS, _dumped(_completion([1] * 500_000 + ["x"]))),
    "prompts times n": (COMPLETIONS, _dumped(_completion(["a"] * 1000, n=128))),
    "long prompts times n": (COMPLETIONS, _dumped(_completion([5] * 4000, n=128))),
    "text without spaces": (COMPLETIONS, _dumped(_completion(_text("abcdefghij")))),
    "one letter": (COMPLETIONS, _dumped(_completion(_text("a")))),
    "spaces": (COMPLETIONS, _dumped(_completion(_text(" ")))),
    "line ends": (COMPLETIONS, _dumped(_completion(_text("\n")))),
    "words": (COMPLETIONS, _dumped(_completion(_text("word and ")))),
    "combining marks": (COMPLETIONS, _dumped(_completion(_text("e\u0301\u0323")))),
    "mixed marks without a letter": (COMPLETIONS, _dumped(_completion(_text("\u0301\u0323")))),
    "escapes": (COMPLETIONS, b'{"prompt":"' + b"\\\\" * (_SIZE // 2) + b'"}'),
    "quotes": (COMPLETIONS, b'{"prompt":"' + b'\\"' * (_SIZE // 2) + b'"}'),
    "unknown fields": (COMPLETIONS, _dumped({"prompt": "x", **_MANY_UNKNOWN})),
    "unknown fields inside": (CHAT, _dumped(_chat(stream=True, stream_options=_MANY_UNKNOWN))),
    "unknown fields of a message": (CHAT, _dumped({"messages": [{"role": "user", "content": "x", **_MANY_UNKNOWN}]})),
    "one field many times": (COMPLETIONS, _filled("{", '"prompt":"x"', "}")),
    "tools": (CHAT, _dumped(_chat(tools=_MANY_TOOLS))),
    "tools that are numbers": (CHAT, _dumped(_chat(tools=[1] * 500_000))),
    "properties": (CHAT, _dumped(_chat(tools=[_tool(0, _WIDE)]))),
    "nested parameters": (CHAT, _dumped(_chat(tools=[_tool(0, _nested(90, lambda inner: {"items": inner}))]))),
    "depth": (CHAT, b'{"messages":' + b"[" * (_SIZE // 2) + b"]" * (_SIZE // 2) + b"}"),
    "messages": (CHAT, _filled('{"messages":[', '{"role":"user","content":"x"}', "]}")),
    "messages as many as are counted": (CHAT, _dumped(_chat(messages=[{"role": "user", "content": "x"}] * 8000))),
    "messages that are numbers": (CHAT, _filled('{"messages":[', "1", "]}")),
    "content parts": (CHAT, _dumped({"messages": [{"role": "user", "content": _PARTS}]})),
    "calls with long arguments": (CHAT, _dumped({"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "[" + "1," * 1_900_000 + "1]"}}]}]})),
    "control tokens": (CHAT, _dumped(_chat(messages=[{"role": "user", "content": _text("<|im_end|>")}]))),
    "markup of the model": (CHAT, _dumped(_chat(messages=[{"role": "assistant", "content": _text("<think>")}]))),
    "logit biases": (CHAT, _dumped(_chat(logit_bias={str(i): 1 for i in range(120_000)}))),
    "stop strings": (CHAT, _dumped(_chat(stop=["x"] * 120_000))),
    "stop strings that are empty": (CHAT, _dumped(_chat(stop=[""] * 120_000))),
    "a long stop string": (CHAT, _dumped(_chat(stop=_text("x")))),
    "metadata": (CHAT, _dumped(_chat(metadata={f"k{i}": i for i in range(60_000)}))),
    "large numbers": (COMPLETIONS, _filled('{"prompt":[', "9" * 4300, "]}")),
    "one large number": (COMPLETIONS, b'{"seed":' + b"9" * _SIZE + b',"prompt":"x"}'),
    "a long model name": (COMPLETIONS, _dumped(_completion("x", model=_text("m")))),
    "input items": (RESPONSES, _filled('{"input":[', '{"role":"user","content":"x"}', "]}")),
    "input parts": (RESPONSES, _dumped({"input": [{"role": "user", "content": _WRONG_PARTS}]})),
    "input items without text": (RESPONSES, _filled('{"input":[', '{"type":"web_search_call"}', "]}")),
    "references": (RESPONSES, _filled('{"input":[', '{"type":"item_reference","id":"x"}', "]}")),
    "a compaction of many texts": (RESPONSES, _dumped({"input": [{
        "type": "compaction", "encrypted_content": _sealed([["x"] * 700_000, "x"])}]})),
    "a compaction of depth": (RESPONSES, _dumped({"input": [{
        "type": "compaction", "encrypted_content": _sealed("[" * 3_000_000)}]})),
    "items to compact": (COMPACT, _filled('{"model":"checkpoint0","input":[', '{"role":"user","content":"x"}', "]}")),
    "allowed tools": (RESPONSES, _dumped({"input": "x", "tool_choice": {
        "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function"}] * 120_000}})),
    "blocks": (MESSAGES, _dumped(_message([{"type": "text", "text": "x"}] * 60_000))),
    "blocks of no type": (MESSAGES, _dumped(_message([{"type": "x"}] * 120_000))),
    "tool results": (MESSAGES, _dumped(_message([
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "x"}] * 2000}] * 30))),
    "inputs of calls": (MESSAGES, _dumped({**_message("x"), "messages": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "1", "name": "f", "input": _WIDE}]}]})),
    "system blocks": (MESSAGES, _dumped({**_message("x"), "system": [{"type": "text", "text": "x"}] * 60_000})),
    "tools of messages": (MESSAGES, _dumped({**_message("x"), "tools": [
        {"name": f"f{i}", "input_schema": {}} for i in range(50_000)]})),
    "ids to detokenize": ("/detokenize", _filled('{"tokens":[', "9", "]}")),
    "ids that are detokenized": ("/detokenize", _dumped({"tokens": [300] * 260_000})),
    "text to tokenize": ("/tokenize", _dumped({"prompt": _text("1 ")})),
    "text to tokenize with special tokens": ("/tokenize", _dumped({"prompt": _text("1 "), "allow_special": True})),
    "tokens of tools": ("/tokenize", _dumped({"messages": [{"role": "user", "content": "x"}], "tools": _MANY_TOOLS})),
    "a wide form": (CHAT, _dumped(_form(_WIDE))),
    "a form of many properties": (CHAT, _dumped(_form({"properties": {f"p{i}": {} for i in range(3500)}}))),
    "a deep form": (CHAT, _dumped(_form(_nested(90, lambda inner: {"items": inner})))),
    "a chain of references": (CHAT, _dumped(_form(_chained(2000, lambda ref: {"allOf": [ref, {"type": "string"}]})))),
    "a chain of objects": (CHAT, _dumped(_form(_chained(1500, lambda ref: {"properties": {"a": ref}})))),
    "a chain of rules": (COMPLETIONS, _dumped(_completion("x", structured_outputs={
        "grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "b"'}))),
    "a large pattern": (COMPLETIONS, _dumped(_completion("x", structured_outputs={"regex": "(a|b)*a" * 400_000}))),
    "a heavy pattern": (COMPLETIONS, _dumped(_completion("x", structured_outputs={"regex": "(.|\n)*" * 1000}))),
    "choices": (COMPLETIONS, _dumped(_completion("x", structured_outputs={
        "choice": [f"c{i}" for i in range(120_000)]}))),
}  # fmt: skip
