"""Request bodies that a server must refuse or answer at little cost: name, path and builder."""

import base64
import json
from collections.abc import Callable

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COMPACT = "/v1/messages", "/v1/responses/compact"
_SIZE = 4 * 2**20 - 4096  # just below the default limit


def _filled(head: str, one: str, tail: str) -> bytes:
    """Returns valid JSON near the size limit: `one` repeated between head and tail."""
    return (head + ",".join([one] * (_SIZE // (len(one) + 1))) + tail).encode()


def _text(part: str) -> str:
    return part * (_SIZE // len(json.dumps(part, ensure_ascii=False).encode()[1:-1]))


def _json(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


_USER = {"role": "user", "content": "x"}


def _chat(**fields) -> dict:
    return {"messages": [_USER], "max_tokens": 4, **fields}


def _tool(number: int, parameters: dict) -> dict:
    return {"type": "function", "function": {"name": f"f{number}", "parameters": parameters}}


def _nested(depth: int, wrap) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = wrap(schema)
    return schema


def _chained(number: int, link) -> dict:
    return {"$ref": "#/$defs/d0", "$defs": {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(number)}}


def _with_string(schema: dict) -> dict:
    return {"allOf": [schema, {"type": "string"}]}


def _form(schema: dict) -> dict:
    return _chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}})


def _prompt(prompt, **fields) -> dict:
    return {"prompt": prompt, "max_tokens": 1, **fields}


def _message(content) -> dict:
    return {"model": "checkpoint0", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}


def _sealed(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "openmimo1." + base64.urlsafe_b64encode(text.encode()).decode()


def _unknown() -> dict:
    return {f"x{i}": 1 for i in range(120_000)}


def _parts(text) -> list[dict]:
    return [{"type": "text", "text": text}] * 30_000


def _tools() -> list[dict]:
    return [_tool(i, {}) for i in range(18_000)]


def _wide() -> dict:
    return {"properties": {f"p{i}": {"type": "string"} for i in range(60_000)}}


# Functions, because all bodies together take seconds to build.
HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "nulls as prompts": (COMPLETIONS, lambda: _filled('{"prompt":[', "null", "]}")),
    "ids as a prompt": (COMPLETIONS, lambda: _filled('{"prompt":[', "1", "]}")),
    "as many ids as are counted": (COMPLETIONS, lambda: _json(_prompt([7] * 520_000))),
    "empty texts as prompts": (COMPLETIONS, lambda: _filled('{"prompt":[', '""', "]}")),
    "empty lists as prompts": (COMPLETIONS, lambda: _filled('{"prompt":[', "[]", "]}")),
    "ids and a text": (COMPLETIONS, lambda: _json(_prompt([1] * 500_000 + ["x"]))),
    "prompts times n": (COMPLETIONS, lambda: _json(_prompt(["a"] * 1000, n=128))),
    "long prompts times n": (COMPLETIONS, lambda: _json(_prompt([5] * 4000, n=128))),
    "text without spaces": (COMPLETIONS, lambda: _json(_prompt(_text("abcdefghij")))),
    "one letter": (COMPLETIONS, lambda: _json(_prompt(_text("a")))),
    "spaces": (COMPLETIONS, lambda: _json(_prompt(_text(" ")))),
    "line ends": (COMPLETIONS, lambda: _json(_prompt(_text("\n")))),
    "words": (COMPLETIONS, lambda: _json(_prompt(_text("word and ")))),
    "combining marks": (COMPLETIONS, lambda: _json(_prompt(_text("e\u0301\u0323")))),
    "mixed marks without a letter": (COMPLETIONS, lambda: _json(_prompt(_text("\u0301\u0323")))),
    "escapes": (COMPLETIONS, lambda: b'{"prompt":"' + b"\\\\" * (_SIZE // 2) + b'"}'),
    "quotes": (COMPLETIONS, lambda: b'{"prompt":"' + b'\\"' * (_SIZE // 2) + b'"}'),
    "unknown fields": (COMPLETIONS, lambda: _json({"prompt": "x", **_unknown()})),
    "unknown fields inside": (CHAT, lambda: _json(_chat(stream=True, stream_options=_unknown()))),
    "unknown fields of a message": (CHAT, lambda: _json({"messages": [{**_USER, **_unknown()}]})),
    "one field many times": (COMPLETIONS, lambda: _filled("{", '"prompt":"x"', "}")),
    "tools": (CHAT, lambda: _json(_chat(tools=_tools()))),
    "tools that are numbers": (CHAT, lambda: _json(_chat(tools=[1] * 500_000))),
    "properties": (CHAT, lambda: _json(_chat(tools=[_tool(0, _wide())]))),
    "nested parameters": (CHAT, lambda: _json(_chat(tools=[_tool(0, _nested(90, lambda inner: {"items": inner}))]))),
    "depth": (CHAT, lambda: b'{"messages":' + b"[" * (_SIZE // 2) + b"]" * (_SIZE // 2) + b"}"),
    "messages": (CHAT, lambda: _filled('{"messages":[', '{"role":"user","content":"x"}', "]}")),
    "messages as many as are counted": (CHAT, lambda: _json(_chat(messages=[{"role": "user", "content": "x"}] * 8000))),
    "messages that are numbers": (CHAT, lambda: _filled('{"messages":[', "1", "]}")),
    "content parts": (CHAT, lambda: _json({"messages": [{"role": "user", "content": _parts("x")}]})),
    "calls with long arguments": (CHAT, lambda: _json({"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "[" + "1," * 1_900_000 + "1]"}}]}]})),
    "control tokens": (CHAT, lambda: _json(_chat(messages=[{"role": "user", "content": _text("<|im_end|>")}]))),
    "markup of the model": (CHAT, lambda: _json(_chat(messages=[{"role": "assistant", "content": _text("<think>")}]))),
    "logit biases": (CHAT, lambda: _json(_chat(logit_bias={str(i): 1 for i in range(120_000)}))),
    "stop strings": (CHAT, lambda: _json(_chat(stop=["x"] * 120_000))),
    "stop strings that are empty": (CHAT, lambda: _json(_chat(stop=[""] * 120_000))),
    "a long stop string": (CHAT, lambda: _json(_chat(stop=_text("x")))),
    "metadata": (CHAT, lambda: _json(_chat(metadata={f"k{i}": i for i in range(60_000)}))),
    "large numbers": (COMPLETIONS, lambda: _filled('{"prompt":[', "9" * 4300, "]}")),
    "one large number": (COMPLETIONS, lambda: b'{"seed":' + b"9" * _SIZE + b',"prompt":"x"}'),
    "a long model name": (COMPLETIONS, lambda: _json(_prompt("x", model=_text("m")))),
    "input items": (RESPONSES, lambda: _filled('{"input":[', '{"role":"user","content":"x"}', "]}")),
    "input parts": (RESPONSES, lambda: _json({"input": [{"role": "user", "content": _parts(1)}]})),
    "input items without text": (RESPONSES, lambda: _filled('{"input":[', '{"type":"web_search_call"}', "]}")),
    "references": (RESPONSES, lambda: _filled('{"input":[', '{"type":"item_reference","id":"x"}', "]}")),
    "a compaction of many texts": (RESPONSES, lambda: _json({"input": [{
        "type": "compaction", "encrypted_content": _sealed([["x"] * 700_000, "x"])}]})),
    "a compaction of depth": (RESPONSES, lambda: _json({"input": [{
        "type": "compaction", "encrypted_content": _sealed("[" * 3_000_000)}]})),
    "items to compact": (COMPACT, lambda: _filled(
        '{"model":"checkpoint0","input":[', '{"role":"user","content":"x"}', "]}")),
    "allowed tools": (RESPONSES, lambda: _json({"input": "x", "tool_choice": {
        "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function"}] * 120_000}})),
    "blocks": (MESSAGES, lambda: _json(_message([{"type": "text", "text": "x"}] * 60_000))),
    "blocks of no type": (MESSAGES, lambda: _json(_message([{"type": "x"}] * 120_000))),
    "tool results": (MESSAGES, lambda: _json(_message([
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "x"}] * 2000}] * 30))),
    "inputs of calls": (MESSAGES, lambda: _json({**_message("x"), "messages": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "1", "name": "f", "input": _wide()}]}]})),
    "system blocks": (MESSAGES, lambda: _json({**_message("x"), "system": [{"type": "text", "text": "x"}] * 60_000})),
    "tools of messages": (MESSAGES, lambda: _json({**_message("x"), "tools": [
        {"name": f"f{i}", "input_schema": {}} for i in range(50_000)]})),
    "ids to detokenize": ("/detokenize", lambda: _filled('{"tokens":[', "9", "]}")),
    "ids that are detokenized": ("/detokenize", lambda: _json({"tokens": [300] * 260_000})),
    "text to tokenize": ("/tokenize", lambda: _json({"prompt": _text("1 ")})),
    "text and special tokens": ("/tokenize", lambda: _json({"prompt": _text("1 "), "allow_special": True})),
    "tokens of tools": ("/tokenize", lambda: _json({"messages": [_USER], "tools": _tools()})),
    "a wide form": (CHAT, lambda: _json(_form(_wide()))),
    "a form of many properties": (CHAT, lambda: _json(_form({"properties": {f"p{i}": {} for i in range(3500)}}))),
    "a deep form": (CHAT, lambda: _json(_form(_nested(90, lambda inner: {"items": inner})))),
    "a chain of references": (CHAT, lambda: _json(_form(_chained(2000, _with_string)))),
    "a chain of objects": (CHAT, lambda: _json(_form(_chained(1500, lambda ref: {"properties": {"a": ref}})))),
    "a chain of rules": (COMPLETIONS, lambda: _json(_prompt("x", structured_outputs={
        "grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "b"'}))),
    "a large pattern": (COMPLETIONS, lambda: _json(_prompt("x", structured_outputs={"regex": "(a|b)*a" * 400_000}))),
    "a heavy pattern": (COMPLETIONS, lambda: _json(_prompt("x", structured_outputs={"regex": "(.|\n)*" * 1000}))),
    "choices": (COMPLETIONS, lambda: _json(_prompt("x", structured_outputs={
        "choice": [f"c{i}" for i in range(120_000)]}))),
}  # fmt: skip
