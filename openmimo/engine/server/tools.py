"""Which tools a reply sees, and how `tool_choice` binds it.

A call that must come is begun for the model: the opening of MiMo's call markup becomes the end of the prompt, so the
reply is its continuation. With several functions to choose from, a pattern lets only their names follow.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openmimo.core.records import Structure
from openmimo.engine.server.errors import invalid

_CALL_OPENING = "<tool_call>\n<function="


@dataclass(frozen=True)
class ToolPolicy:
    """tools: shown to the model, in OpenAI's chat form. opening: text that the reply begins with. structure: what the
    text after the opening must look like. one_call: whether the reply ends after its first call. reads_calls: whether
    what looks like a call is one."""

    tools: tuple[dict[str, Any], ...] = ()
    opening: str = ""
    structure: Structure | None = None
    one_call: bool = False
    reads_calls: bool = True


def tool_policy(
    tools: Sequence[dict[str, Any]], *, mode: str, function: str | None, parallel: bool | None
) -> ToolPolicy:
    """mode: none, auto, required, or function, which calls `function`. Raises ApiError if there is no such tool."""
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise invalid("Two tools have the same function name.", "tools")
    if mode == "none":
        return ToolPolicy(reads_calls=False)
    one_call = parallel is False
    if mode == "auto":
        return ToolPolicy(tuple(tools), one_call=one_call)
    if mode == "function" and function not in names:
        raise invalid(f"tool_choice names the function {function!r}, which is not among the tools.", "tool_choice")
    if not names:
        raise invalid("tool_choice asks for a call, but there are no tools.", "tool_choice")
    if mode == "function" or len(names) == 1:
        opening = f"{_CALL_OPENING}{function or names[0]}>\n"
        return ToolPolicy(tuple(tools), opening, one_call=one_call or mode == "function")
    pattern = f"({'|'.join(map(re.escape, names))})>\n(.|\n)*"
    return ToolPolicy(tuple(tools), _CALL_OPENING, Structure("regex", pattern), one_call)
