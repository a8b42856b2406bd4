"""The tools of a request, and the constraints that `tool_choice` puts on its reply.

A required call is forced by a prefix: the prompt ends with the opening of MiMo's call markup, and the reply continues
it. A regular expression allows only function names to follow, and does not let the reply end before the call is
complete. A call of a function with required parameters contains at least one of them. If the model thinks first, the
regular expression contains the opening. Where the request demands a form, and tools may be called, the reply is either.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from openmimo.core.records import Structure
from openmimo.engine.server.http.errors import invalid

CALL_MARK = "<tool_call>"
_CALL_OPENING = CALL_MARK + "\n<function="
_REST_OF_CALL = "(.|\n)*</function>(.|\n)*"


@dataclass(frozen=True)
class ToolPolicy:
    """The tools and the constraints on tool calls.

    Attributes:
        tools: Tools in the prompt, in OpenAI's chat format.
        opening: Text that the reply begins with.
        structure: Constraint on the text after the opening.
        one_call: Whether the reply ends after its first call.
        reads_calls: Whether call markup in the reply is parsed as calls.
    """

    tools: tuple[dict[str, Any], ...] = ()
    opening: str = ""
    structure: Structure | None = None
    one_call: bool = False
    reads_calls: bool = True


def tool_policy(
    tools: Sequence[dict[str, Any]], *, mode: str, function: str | None, parallel: bool | None
) -> ToolPolicy:
    """Build the policy of a request.

    Args:
        tools: Tools in OpenAI's chat format.
        mode: "none", "auto", "required" (or its synonym "any"), or "function" for a call of `function`.
        function: Name of the required function if `mode` is "function".
        parallel: False ends the reply after its first call.

    Raises:
        ApiError: Two tools have the same name, or the required tool does not exist.
    """
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
        raise invalid("tool_choice requires a call, but there are no tools.", "tool_choice")
    if mode == "function" or len(names) == 1:
        name = function or names[0]
        structure = Structure("regex", _first_parameter(tools[names.index(name)]) + _REST_OF_CALL)
        return ToolPolicy(tuple(tools), f"{_CALL_OPENING}{name}>\n", structure, one_call=one_call or mode == "function")
    return ToolPolicy(tuple(tools), _CALL_OPENING, Structure("regex", _rest_of_any_call(tools)), one_call)


def selected_tools(tools: Sequence[dict[str, Any]], names: Sequence[str], param: str) -> list[dict[str, Any]]:
    """The tools with these function names. Raises ApiError, for the field `param`, for a name without a tool."""
    known = {tool["function"]["name"] for tool in tools}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise invalid(f"The function {unknown!r} is not among the tools.", param)
    return [tool for tool in tools if tool["function"]["name"] in names]


def _rest_of_any_call(tools: Sequence[dict[str, Any]]) -> str:
    """The pattern of a call of one of the tools, after the opening, and of the text after the call."""
    openings = (f"{re.escape(tool['function']['name'])}>\n{_first_parameter(tool)}" for tool in tools)
    return f"({'|'.join(openings)}){_REST_OF_CALL}"


def _first_parameter(tool: dict[str, Any]) -> str:
    """The pattern of one of the required parameters; empty if the function has none."""
    required = (tool["function"].get("parameters") or {}).get("required")
    names = required if isinstance(required, list) else []
    patterns = [re.escape(name) for name in names if isinstance(name, str) and re.fullmatch(r"[\w.\-]{1,128}", name)]
    return f"<parameter=({'|'.join(patterns)})>(.|\n)*</parameter>\n" if patterns else ""


def without_opening(policy: ToolPolicy) -> ToolPolicy:
    """The same policy for a reply that thinks before a required call: its structure contains the opening."""
    if policy.structure is None or not policy.opening:
        return policy
    pattern = re.escape(policy.opening) + policy.structure.source
    return replace(policy, opening="", structure=replace(policy.structure, source=pattern))


def reply_structure(policy: ToolPolicy, form: Structure | None, *, thoughts: str) -> Structure | None:
    """The structure of a reply: its thoughts, then tool calls or the form.

    Args:
        policy: The tools. If a call is required, there is no room for the form.
        form: The form that the request demands.
        thoughts: Pattern of the thinking at the beginning of the reply; empty if it begins without thinking.
    """
    if policy.structure is not None:
        form = policy.structure
    elif form is not None and policy.tools:
        form = replace(form, alternative=f"{re.escape(_CALL_OPENING)}{_rest_of_any_call(policy.tools)}")
    return form if form is None or not thoughts else replace(form, prefix=thoughts)
