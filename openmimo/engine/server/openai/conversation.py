"""Messages and template options of OpenAI's requests, in the form that the chat template takes."""

from collections.abc import Sequence
from typing import Any

from openmimo.engine.server.chat.prompts import ChatOptions
from openmimo.engine.server.http.errors import invalid
from openmimo.engine.server.openai.schema import ChatMessage, TemplateOptions

_THINKING_EFFORTS = ("low", "medium", "high", "xhigh", "max")


def template_options(options: TemplateOptions | None, effort: str | None, effort_param: str) -> ChatOptions:
    """Merge chat_template_kwargs and the reasoning effort. Thinking is on or off: efforts of low and above enable it.

    Raises ApiError, for the field `effort_param`, if the two contradict each other.
    """
    options = options or TemplateOptions()
    effort_thinks = None if effort is None else effort in _THINKING_EFFORTS
    if None not in (effort_thinks, options.enable_thinking) and effort_thinks != options.enable_thinking:
        raise invalid(f"{effort_param} and chat_template_kwargs.enable_thinking contradict each other.", effort_param)
    enable = options.enable_thinking if effort_thinks is None else effort_thinks
    return ChatOptions(thinks=bool(enable), keep_all_reasoning=options.keep_all_reasoning)


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Convert messages to the form that templates take. "developer" is OpenAI's newer name of the role "system"."""
    turns = []
    for message in messages:
        turn = message.model_dump(exclude_none=True, exclude={"audio"})
        turn["role"] = "system" if message.role == "developer" else message.role
        turns.append(turn)
    return turns
