"""A server whose replies come from a script: it asks for a tool first, and answers from the tool's result.

A question of a coding agent gets what `scripted_agent.py` says. A question without tools gets a form if the request
demands one, and a text otherwise.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripted_agent import next_turn, shell_in

from openmimo.core.records import Request
from openmimo.engine.server.backends.stub import Step, StubBackend
from openmimo.engine.server.config import ServerConfig
from openmimo.engine.server.serve import serve

FORM = {"city": "Oslo", "degrees": 4}
_POSITIONS = 1 << 20  # the prompts of coding agents have many tokens of this small vocabulary


def script(prompt: str, request: Request) -> Iterator[Step]:
    """The reply in pieces of four characters."""
    last_turn = prompt.rsplit("<|im_start|>", 2)[1]
    tools = [name.split("</name>")[0] for name in prompt.split("<function>\n<name>")[1:]]
    if shell := shell_in(tools):
        text = next_turn(prompt, shell)
    elif tools and not last_turn.startswith("tool"):
        text = _call(prompt, tools[0])
    elif tools and "final_result" in tools[-1]:
        values = "".join(f"<parameter={name}>{value}</parameter>\n" for name, value in FORM.items())
        text = f"<tool_call>\n<function={tools[-1]}>\n{values}</function>\n</tool_call>"
    else:
        text = json.dumps(FORM) if request.params.structure else "It is 4 degrees in Oslo."
    for start in range(0, len(text), 4):
        yield Step((text[start : start + 4],))


def _call(prompt: str, tool: str) -> str:
    """A call with the first parameter that the prompt describes as a city or a location."""
    found = re.search(r"<name>(city|location)</name>", prompt)
    name = found[1] if found else "city"
    opening = f"<tool_call>\n<function={tool}>\n"
    text = f"{opening}<parameter={name}>Oslo</parameter>\n</function>\n</tool_call>"
    for end in ("<tool_call>\n<function=", opening):
        if prompt.endswith(end):  # the server has written the beginning of a required call
            text = text.removeprefix(end)
    return text


if __name__ == "__main__":
    serve(StubBackend(script, model_name="tiny", max_positions=_POSITIONS), ServerConfig(port=0))
