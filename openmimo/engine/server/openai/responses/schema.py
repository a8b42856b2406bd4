"""Request schemas of the supported part of OpenAI's Responses API."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from openmimo.engine.server.chat.schema import FunctionParameters, OutputSchema, check_tools
from openmimo.engine.server.http import limits
from openmimo.engine.server.http.bodies import check_counts, read_json
from openmimo.engine.server.http.fields import (
    Fields,
    Label,
    LenientFields,
    Name,
    Text,
    check_is_text,
    few_entries,
    text_or,
)
from openmimo.engine.server.openai.responses.sealed import seal, unseal
from openmimo.engine.server.openai.schema import CommonFields, TemplateOptions, ToolMode


class TextPart(LenientFields):
    """A part of a message. Only text is supported; the text of a refusal is in the field `refusal`."""

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        check_is_text(value)
        if isinstance(value, dict) and value.get("type") == "refusal" and "refusal" in value:
            return {"type": "refusal", "text": value["refusal"]}
        return value


TextParts = Annotated[list[TextPart], Field(max_length=limits.PARTS, fail_fast=True)]
TextOrParts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[TextParts, Tag("<parts>")],
    text_or("<parts>"),
]


def parts_text(content: str | list[TextPart] | None) -> str:
    """Return the text of a message, of reasoning, or of a tool's output."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


class MessageItem(LenientFields):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: TextOrParts | None = None


class ReasoningItem(LenientFields):
    """Reasoning of an earlier turn of the model, as the server returned it.

    Attributes:
        content: The reasoning. Some clients return only encrypted_content or the summary.
        summary: The reasoning, if the request has asked for a summary.
        encrypted_content: The reasoning as `seal` encoded it. That of other providers is ignored.
    """

    type: Literal["reasoning"]
    content: TextParts | None = None
    summary: TextParts | None = None
    encrypted_content: str | None = None


class FunctionCallItem(LenientFields):
    """A function call of an earlier turn of the model, with its arguments as the server returned them."""

    type: Literal["function_call"]
    call_id: Label
    name: Text
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_bounded(cls, value: str) -> str:
        check_counts(value.encode(), limits.SCHEMA_VALUES)
        return value


class FunctionOutputItem(LenientFields):
    """The result of a function call, or of a call of a custom tool."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Label
    output: TextOrParts


class CustomCallItem(LenientFields):
    """A call of a custom tool, whose input is a text, in an earlier turn of the model."""

    type: Literal["custom_tool_call"]
    call_id: Label
    name: Text
    input: str


class CompactionItem(LenientFields):
    """A compacted conversation, as the server returned it. See `compacted_content`."""

    type: Literal["compaction", "compaction_summary"]
    encrypted_content: str

    @field_validator("encrypted_content")
    @classmethod
    def _is_ours(cls, value: str) -> str:
        if unseal_compacted(value) is None:
            raise ValueError("it is not a compaction of this server; send the conversation itself.")
        return value

    @property
    def kept(self) -> list[str]:
        """The texts of the user's messages."""
        return _compacted(self.encrypted_content)[0]

    @property
    def summary(self) -> str:
        """The model's summary of the conversation."""
        return _compacted(self.encrypted_content)[1]


def compacted_content(kept: list[str], summary: str) -> str:
    """Encode the user's messages and a summary for the encrypted_content of a compaction item."""
    return seal(json.dumps([kept, summary], ensure_ascii=False))


def unseal_compacted(content: str) -> tuple[list[str], str] | None:
    """Decode what `compacted_content` encoded. Returns None for anything else."""
    text = unseal(content)
    try:
        value = None if text is None else read_json(text.encode(), limits.VALUES)
    except ValueError:
        return None
    match value:
        case [list() as kept, str() as summary] if all(isinstance(one, str) for one in kept):
            return kept, summary
    return None


def _compacted(content: str) -> tuple[list[str], str]:
    compacted = unseal_compacted(content)
    assert compacted is not None  # validated
    return compacted


class ItemReference(LenientFields):
    """An item of a stored response or of its input."""

    type: Literal["item_reference"]
    id: Label


class SkippedItem(LenientFields):
    """A call of a tool that the server does not run, or its output. The item is skipped."""

    type: str


def _tag(item: Any) -> str | None:
    """Select the member of `InputItem` by the item's type, which messages may omit."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    return _TAGS.get(kind) if isinstance(kind, str) else None


_SKIPPED = (
    "additional_tools", "apply_patch_call", "apply_patch_call_output", "code_interpreter_call", "computer_call",
    "computer_call_output", "file_search_call", "ghost_snapshot", "image_generation_call", "local_shell_call",
    "local_shell_call_output", "mcp_approval_request", "mcp_approval_response", "mcp_call", "mcp_list_tools",
    "shell_call", "shell_call_output", "tool_search_call", "tool_search_output", "web_search_call",
)  # fmt: skip
_TAGS = {
    "message": "<message>",
    "reasoning": "<reasoning>",
    "function_call": "<function call>",
    "function_call_output": "<output>",
    "custom_tool_call": "<custom call>",
    "custom_tool_call_output": "<output>",
    "compaction": "<compaction>",
    "compaction_summary": "<compaction>",
    "item_reference": "<reference>",
    **dict.fromkeys(_SKIPPED, "<skipped>"),
}
InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[FunctionCallItem, Tag("<function call>")]
    | Annotated[FunctionOutputItem, Tag("<output>")]
    | Annotated[CustomCallItem, Tag("<custom call>")]
    | Annotated[CompactionItem, Tag("<compaction>")]
    | Annotated[ItemReference, Tag("<reference>")]
    | Annotated[SkippedItem, Tag("<skipped>")],
    Discriminator(
        _tag,
        custom_error_type="input_item",
        custom_error_message="this is not an item of a type that the server knows, such as message or function_call",
    ),
]


class ResponseTool(Fields):
    """A function that the model may call. `strict` is accepted without effect: the schema is not enforced."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
    description: str | None = None
    parameters: FunctionParameters = None
    strict: bool | None = None

    @property
    def parameters_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the arguments."""
        return self.parameters


class OtherTool(LenientFields):
    """A tool that the server does not run, such as web search. It is left out of the prompt."""

    type: Name

    @property
    def parameters_schema(self) -> dict[str, Any] | None:
        """The model does not see the tool, so there are no arguments."""
        return None


class ResponseToolChoice(Fields):
    """The function that the model must call."""

    type: Literal["function"]
    name: Text


class AllowedTool(LenientFields):
    """A tool of the request."""

    type: Name
    name: Name | None = None


class AllowedTools(LenientFields):
    """The tools that the model may or must call, among those of the request."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Field(min_length=1, max_length=limits.TOOLS, fail_fast=True)]

    @property
    def names(self) -> list[str]:
        """Names of the allowed functions."""
        return [tool.name or "" for tool in self.tools if tool.type == "function"]


def _choice_tag(value: Any) -> str:
    if isinstance(value, str):
        return "<text>"
    return "<allowed>" if isinstance(value, dict) and value.get("type") == "allowed_tools" else "<named>"


ToolChoice = Annotated[
    ToolMode | Annotated[ResponseToolChoice, Tag("<named>")] | Annotated[AllowedTools, Tag("<allowed>")],
    Discriminator(_choice_tag),
]


def _tool_tag(value: Any) -> str:
    is_other = isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] != "function"
    return "<other>" if is_other else "<function>"


AnyTool = Annotated[
    Annotated[ResponseTool, Tag("<function>")] | Annotated[OtherTool, Tag("<other>")], Discriminator(_tool_tag)
]


class TextFormat(Fields):
    """The format of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    json_schema: OutputSchema | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('schema must be set exactly if type is "json_schema".')
        return self


class TextOptions(Fields):
    """Options of the reply's text. `verbosity` is accepted without effect."""

    format: TextFormat | None = None
    verbosity: Name | None = None


class ReasoningOptions(Fields):
    """Options of the model's reasoning.

    Attributes:
        effort: Whether the model thinks.
        summary: If set, the full reasoning is returned as the summary, which most clients show.
        generate_summary: The earlier name of `summary`.
    """

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Name | None = None
    generate_summary: Name | None = None


class ResponseStreamOptions(Fields):
    """Options of the stream. `include_obfuscation` is accepted without effect."""

    include_obfuscation: bool | None = None


ResponseTools = Annotated[list[AnyTool], Field(max_length=limits.TOOLS, fail_fast=True), AfterValidator(check_tools)]


ResponseInput = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[InputItem], Field(max_length=limits.MESSAGES, fail_fast=True), Tag("<items>")],
    text_or("<items>"),
]


def _is_given(value: Any, info: ValidationInfo) -> Any:
    if not value and info.data.get("previous_response_id") is None:
        raise PydanticCustomError("missing", "it is missing")
    return value


NewInput = Annotated[ResponseInput | None, AfterValidator(_is_given)]


_LOGPROBS = "message.output_text.logprobs"


class ResponseRequest(CommonFields):
    """POST /v1/responses. There are no conversations, background responses and prompt templates.

    Attributes:
        input: A user message, or items. With previous_response_id, they follow that response.
        previous_response_id: A stored response, whose conversation this request continues.
        include: "reasoning.encrypted_content" returns the reasoning also in that field, "message.output_text.logprobs"
            the log-probabilities of the tokens of messages. Other values have no effect.
        max_tool_calls, client_metadata: Accepted without effect; the former limits tools that servers run.
        top_logprobs: Number of likeliest tokens at each position of messages. Needs the value in `include`.
        background: Only false.
        truncation: "auto" leaves out the oldest turns of a conversation that is too long.
    """

    previous_response_id: Name | None = None
    input: NewInput = Field(None, validate_default=True)
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tools: ResponseTools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[Name], Field(max_length=32, fail_fast=True)] | None = None
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: TemplateOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    conversation: Any | None = None
    background: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    client_metadata: Annotated[dict[Name, Any], few_entries(limits.LABELS)] | None = None

    @property
    def has_logprobs(self) -> bool:
        """Whether the response contains log-probabilities."""
        return _LOGPROBS in (self.include or ())

    @field_validator("conversation")
    @classmethod
    def _has_no_conversation(cls, value: Any) -> Any:
        if value:
            raise ValueError("this server does not offer it; continue a response with previous_response_id.")
        return value

    @field_validator("background")
    @classmethod
    def _is_in_the_foreground(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("this server runs no responses in the background; omit it, or set stream to true.")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _has_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and _LOGPROBS not in (info.data.get("include") or ()):
            raise ValueError(f'it requires include: ["{_LOGPROBS}"].')
        return value


class ResponseCreateEvent(ResponseRequest):
    """A message of a WebSocket client that creates a response. `stream` has no effect: the reply is always streamed.

    Attributes:
        generate: False reads the prompt into the cache and creates a response without output, to be continued.
    """

    type: Literal["response.create"]
    generate: bool | None = None


class CompactRequest(Fields):
    """POST /v1/responses/compact.

    Attributes:
        model: Name of the model that writes the summary.
        input: The conversation, or its continuation if there is a previous_response_id.
        instructions: The system message for the summary.
        previous_response_id: A stored response, whose conversation is compacted.
        prompt_cache_key, prompt_cache_options, prompt_cache_retention, service_tier: Accepted without effect.
    """

    model: Name
    previous_response_id: Name | None = None
    input: NewInput = Field(None, validate_default=True)
    instructions: str | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_options: Any | None = None
    prompt_cache_retention: Name | None = None
    service_tier: Name | None = None
