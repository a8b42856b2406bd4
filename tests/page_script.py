"""The replies of the backend in the chat page's tests: one for each word that a test sends."""

from collections.abc import Iterator

from openmimo.core.records import Request
from openmimo.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from openmimo.engine.server.backends.stub import Step, StubBackend

_BOLD = "A **several tokens** "
_HOSTILE = (
    "<script>window.stolen = 1</script> <img src=x onerror='window.stolen = 1'> "
    "[click](javascript:window.stolen=1) ![x](data:text/html,1) [safe](https://example.org/a_b_c)\n\n"
    "```html\n<img src=x onerror='window.stolen = 1'>\n```\n"
)
_WIDE = (
    f"{'unbreakable' * 30}\n\n`{'code' * 60}`\n\n```\n{'a long line ' * 30}\n```\n\n"
    f"{'|'.join(['a wide header'] * 9)}\n{'|'.join(['---'] * 9)}\n{'|'.join(['cell'] * 9)}\n"
)
_WEATHER_CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>Oslo</parameter>\n</function>\n</tool_call>"
_REPLIES = {
    "hello": [Step((_BOLD,)), Step(("a", "b", " ")), Step(("\n", "\n", "\n", "\n"))],
    "code": [Step(("```python\n",)), Step(("print(", "'hello')", "\n```"))],
    "break": [Step(("so", " far")), Step((), error="out of pages")],
    "think": [Step(("<think>",)), Step(("First,", " the question.", "</think>")), Step(("The", " answer."))],
    "weather": [Step((_WEATHER_CALL[start : start + 9],)) for start in range(0, len(_WEATHER_CALL), 9)],
    "hostile": [Step((_HOSTILE,))],
    "wide": [Step((_WIDE,))],
}


def scripted_backend() -> StubBackend:
    """A backend for the page; its model is called "scripted"."""
    tokenizer = Tokenizer.train(["a word"], vocab_size=300, special_tokens=(*SPECIAL_TOKENS, _BOLD))
    return StubBackend(_script, tokenizer=tokenizer, model_name="scripted", step_seconds=0.01, max_positions=16384)


def _script(prompt: str, request: Request) -> Iterator[Step]:
    asked = prompt.rsplit("<|im_start|>user\n", 1)[-1]
    if "<tool_response>" in asked:
        yield Step(("It is cold.",))
        return
    word = asked.split("<|im_end|>")[0].split("\n")[-1]
    if word == "endless call":
        yield Step(("Looking.<tool_call>\n<function=get_weather>\n<parameter=city>",))
    while word.startswith("endless"):
        yield Step((" word",))
    yield from _REPLIES.get(word) or [Step((word.removeprefix("echo "),))]
