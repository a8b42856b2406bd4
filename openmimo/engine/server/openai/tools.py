"""Which tools a reply sees, and how `tool_choice` binds it.

A call that must come is begun for the model: the opening of MiMo's call markup becomes the end of the prompt, so the
reply is its continuation. A pattern lets only names of functions follow, and no end of the reply before the call is
whole; a function with required parameters gets one of them at least.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openmimo.core.records import Structure
from openmimo.engine.server.http.errors import invalid

CALL_MARK = "<tool_call>"
_CALL_OPENING = CALL_MARK + "\n<function="
_REST_OF_CALL = "(.|\n)*</function>(.|\n)*"


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
        name = function or names[0]
        structure = Structure("regex", _first_parameter(tools[names.index(name)]) + _REST_OF_CALL)
        return ToolPolicy(tuple(tools), f"{_CALL_OPENING}{name}>\n", structure, one_call=one_call or mode == "function")
    openings = (f"{re.escape(name)}>\n{_first_parameter(tool)}" for name, tool in zip(names, tools, strict=True))
    pattern = f"({'|'.join(openings)}){_REST_OF_CALL}"
    return ToolPolicy(tuple(tools), _CALL_OPENING, Structure("regex", pattern), one_call)


def _first_parameter(tool: dict[str, Any]) -> str:
    """The pattern of a required parameter; empty if the function requires none."""
    required = (tool["function"].get("parameters") or {}).get("required")
    names = required if isinstance(required, list) else []
    known = [re.escape(name) for name in names if isinstance(name, str) and re.fullmatch(r"[\w.\-]{1,128}", name)]
    return f"<parameter=({'|'.join(known)})>(.|\n)*</parameter>\n" if known else ""


def check_structure_alone(policy: ToolPolicy, *, thinks: bool, param: str = "response_format") -> None:
    """A structure binds the whole reply, so it leaves no room for thoughts or calls. Raises ApiError."""
    if thinks:
        raise invalid("A reply of a fixed form has no room for thinking: turn one of the two off.", param)
    if policy.tools:
        raise invalid(
            'A reply of a fixed form has no room for tool calls: leave the tools out, or set tool_choice to "none".',
            param,
        )
