"""Request schemas of the supported part of Anthropic's Messages API.

Blocks and tools ignore unknown fields, such as cache_control: the server caches every prefix.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from openmimo.engine.server.chat.schema import FunctionParameters, OutputSchema, check_tools
from openmimo.engine.server.http import limits
from openmimo.engine.server.http.bodies import check_tree
from openmimo.engine.server.http.fields import (
    Fields,
    Label,
    LenientFields,
    Name,
    Probability,
    StopText,
    Text,
    check_is_text,
    text_or,
)


class TextBlock(LenientFields):
    """A text."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        check_is_text(value)
        return value


class TextSource(LenientFields):
    """The text of a document."""

    type: Literal["text"]
    data: str


class DocumentBlock(LenientFields):
    """A document whose source is a text."""

    type: Literal["document"]
    source: TextSource
    title: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        source = value.get("source") if isinstance(value, dict) else None
        if not isinstance(source, dict) or source.get("type") != "text":
            check_is_text(value)
        return value

    @property
    def text(self) -> str:
        """The document as a text."""
        return f"{self.title}\n\n{self.source.data}" if self.title else self.source.data


class ThinkingBlock(LenientFields):
    """Thinking of an earlier turn of the model, as the server returned it. The signature is not checked."""

    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(LenientFields):
    """A tool call of an earlier turn of the model."""

    type: Literal["tool_use"]
    id: Label
    name: Text
    input: dict[str, Any]

    @field_validator("input")
    @classmethod
    def _is_bounded(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_tree(value, limits.SCHEMA_VALUES)
        return value


class SkippedBlock(LenientFields):
    """A block of a tool that the server does not run, or hidden thinking. It is left out of the prompt."""

    type: str


def _block_tag(block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind in ("thinking", "tool_use", "tool_result", "document"):
        return f"<{kind.replace('_', ' ')}>"
    if kind in _SKIPPED or (isinstance(kind, str) and kind.endswith("_tool_result")):
        return "<skipped>"
    return "<text>"


_SKIPPED = ("container_upload", "mcp_tool_use", "redacted_thinking", "server_tool_use", "tool_reference")
ResultPart = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[DocumentBlock, Tag("<document>")]
    | Annotated[SkippedBlock, Tag("<skipped>")],
    Discriminator(_block_tag),
]
ResultContent = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[ResultPart], Field(max_length=limits.PARTS, fail_fast=True), Tag("<blocks>")],
    text_or("<blocks>"),
]


class ToolResultBlock(LenientFields):
    """The result of a tool call. The model sees the content; `is_error` has no effect."""

    type: Literal["tool_result"]
    tool_use_id: Label
    content: ResultContent | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[DocumentBlock, Tag("<document>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool use>")]
    | Annotated[ToolResultBlock, Tag("<tool result>")]
    | Annotated[SkippedBlock, Tag("<skipped>")],
    Discriminator(_block_tag),
]


class Turn(LenientFields):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[Block], Field(max_length=limits.PARTS, fail_fast=True), Tag("<blocks>")],
        text_or("<blocks>"),
    ]

    @model_validator(mode="after")
    def _blocks_of_its_role(self) -> "Turn":
        of_others = {"user": ThinkingBlock | ToolUseBlock, "assistant": ToolResultBlock | DocumentBlock}
        others = of_others.get(self.role, ThinkingBlock | ToolUseBlock | ToolResultBlock)
        for block in self.content if isinstance(self.content, list) else ():
            if isinstance(block, others):
                raise ValueError(f"a turn of the role {self.role} has no {block.type} blocks.")
        return self


class Tool(LenientFields):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
    description: str | None = None
    input_schema: FunctionParameters = Field()

    @property
    def parameters_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the input."""
        return self.input_schema


class OtherTool(LenientFields):
    """A tool of Anthropic, such as web search, whose definition the model does not know. It is left out."""

    type: Name

    @property
    def parameters_schema(self) -> dict[str, Any] | None:
        """The model does not see the tool, so there is no input."""
        return None


def _tool_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return "<other>" if isinstance(kind, str) and kind != "custom" else "<tool>"


AnyTool = Annotated[Annotated[Tool, Tag("<tool>")] | Annotated[OtherTool, Tag("<other>")], Discriminator(_tool_tag)]


class ToolChoice(LenientFields):
    """Whether and how the model calls tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _name_with_its_type(self) -> "ToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise ValueError('name must be set exactly if type is "tool".')
        return self


class Thinking(LenientFields):
    """Whether the model thinks: always if enabled or adaptive, after tool results, or not at all.

    `budget_tokens` and `display` are accepted without effect.
    """

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class OutputFormat(LenientFields):
    """The form of the reply's text."""

    type: Literal["json_schema"]
    json_schema: OutputSchema = Field(alias="schema")


class OutputConfig(LenientFields):
    """Options of the reply. `effort` is accepted without effect."""

    format: OutputFormat | None = None


SystemText = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextBlock], Field(max_length=limits.PARTS, fail_fast=True), Tag("<blocks>")],
    text_or("<blocks>"),
]


class PromptRequest(Fields):
    """POST /v1/messages/count_tokens: the fields that decide the prompt.

    Attributes:
        output_format: The earlier name of output_config.format.
        thread: Not supported. The error makes Anthropic's clients send the whole conversation.
        cache_control, container, context_management, diagnostics, inference_geo, service_tier, speed,
            user_profile_id, workspace_id: Accepted without effect.
    """

    model: Name
    messages: Annotated[list[Turn], Field(min_length=1, max_length=limits.MESSAGES, fail_fast=True)]
    system: SystemText | None = None
    tools: (
        Annotated[list[AnyTool], Field(max_length=limits.TOOLS, fail_fast=True), AfterValidator(check_tools)] | None
    ) = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_control: Any | None = None
    container: Any | None = None
    context_management: Any | None = None
    diagnostics: Any | None = None
    inference_geo: Any | None = None
    service_tier: Any | None = None
    speed: Any | None = None
    thread: Any | None = None
    user_profile_id: Any | None = None
    workspace_id: Any | None = None

    @property
    def form(self) -> OutputFormat | None:
        """The form that the request demands."""
        return (self.output_config and self.output_config.format) or self.output_format


class MessagesRequest(PromptRequest):
    """POST /v1/messages. `metadata` is accepted without effect."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    metadata: Any | None = None
