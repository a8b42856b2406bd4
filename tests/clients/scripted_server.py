"""A server whose replies come from a script: it asks for a tool first, and answers from the tool's result.

A question without tools gets a form if the request demands one, and a text otherwise.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from openmimo.core.records import Request
from openmimo.engine.server.backends.stub import Step, StubBackend
from openmimo.engine.server.config import ServerConfig
from openmimo.engine.server.serve import serve

FORM = {"city": "Oslo", "degrees": 4}


def script(prompt: str, request: Request) -> Iterator[Step]:
    """The reply in pieces of four characters."""
    last_turn = prompt.rsplit("<|im_start|>", 2)[1]
    tools = [name.split("</name>")[0] for name in prompt.split("<function>\n<name>")[1:]]
    if tools and not last_turn.startswith("tool"):
        opening = f"<tool_call>\n<function={tools[0]}>\n"
        text = f"{opening}<parameter=city>Oslo</parameter>\n</function>\n</tool_call>"
        for end in ("<tool_call>\n<function=", opening):
            if prompt.endswith(end):  # the server has written the beginning of a required call
                text = text.removeprefix(end)
    elif tools and "final_result" in tools[-1]:
        values = "".join(f"<parameter={name}>{value}</parameter>\n" for name, value in FORM.items())
        text = f"<tool_call>\n<function={tools[-1]}>\n{values}</function>\n</tool_call>"
    else:
        text = json.dumps(FORM) if request.params.structure else "It is 4 degrees in Oslo."
    for start in range(0, len(text), 4):
        yield Step((text[start : start + 4],))


if __name__ == "__main__":
    serve(StubBackend(script, model_name="tiny"), ServerConfig(port=0))
