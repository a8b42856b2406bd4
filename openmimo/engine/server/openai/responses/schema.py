"""Request schema of the supported part of OpenAI's Responses API."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from openmimo.engine.server.http import limits
from openmimo.engine.server.http.bodies import check_counts
from openmimo.engine.server.http.fields import Fields, Label, LenientFields, Name, Text, text_or
from openmimo.engine.server.openai.schema import (
    CommonFields,
    FunctionParameters,
    OutputSchema,
    TemplateOptions,
    ToolMode,
    check_tools,
)


class TextPart(LenientFields):
    """A part of a message. Only text is supported."""

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str


TextParts = Annotated[list[TextPart], Field(max_length=limits.PARTS, fail_fast=True)]
TextOrParts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[TextParts, Tag("<parts>")],
    text_or("<parts>"),
]


class MessageItem(LenientFields):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: TextOrParts | None = None


class ReasoningItem(LenientFields):
    """Reasoning of an earlier turn of the model, as the server returned it."""

    type: Literal["reasoning"]
    content: TextParts | None = None


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
    """The result of a function call."""

    type: Literal["function_call_output"]
    call_id: Label
    output: TextOrParts


def _tag(item: Any) -> str | None:
    """Select the member of `InputItem` by the item's type, which messages may omit."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    return _TAGS.get(kind) if isinstance(kind, str) else None


_TAGS = {
    "message": "<message>",
    "reasoning": "<reasoning>",
    "function_call": "<function call>",
    "function_call_output": "<function output>",
}
InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[FunctionCallItem, Tag("<function call>")]
    | Annotated[FunctionOutputItem, Tag("<function output>")],
    Discriminator(
        _tag,
        custom_error_type="input_item",
        custom_error_message="an item is an object of type message, reasoning, function_call or function_call_output",
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


class ResponseToolChoice(Fields):
    """The function that the model must call."""

    type: Literal["function"]
    name: Text


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
    """Options of the reply's text."""

    format: TextFormat | None = None


class ReasoningOptions(Fields):
    """Options of the model's reasoning. `summary` is accepted without effect: the full reasoning is returned."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Name | None = None


class ResponseStreamOptions(Fields):
    """Options of the stream. `include_obfuscation` is accepted without effect."""

    include_obfuscation: bool | None = None


ResponseTools = Annotated[
    list[ResponseTool], Field(max_length=limits.TOOLS, fail_fast=True), AfterValidator(check_tools)
]


class ResponseRequest(CommonFields):
    """POST /v1/responses.

    The server is stateless: `input` contains the whole conversation, and previous_response_id, conversation and
    background are rejected.
    """

    input: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[list[InputItem], Field(min_length=1, max_length=limits.MESSAGES, fail_fast=True), Tag("<items>")],
        text_or("<items>"),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tools: ResponseTools | None = None
    tool_choice: Annotated[ToolMode | Annotated[ResponseToolChoice, Tag("<named>")], text_or("<named>")] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    # Accepted without effect: reasoning is returned unencrypted.
    include: Annotated[list[Literal["reasoning.encrypted_content"]], Field(max_length=8, fail_fast=True)] | None = None
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: TemplateOptions | None = None
    truncation: Name | None = None
    previous_response_id: Name | None = None
    conversation: Any | None = None
    background: bool | None = None

    @field_validator("truncation")
    @classmethod
    def _not_shortened(cls, value: str | None) -> str | None:
        if value not in (None, "disabled"):
            raise ValueError("this server does not truncate conversations; omit the field.")
        return value

    @field_validator("previous_response_id", "conversation", "background")
    @classmethod
    def _keeps_no_state(cls, value: Any) -> Any:
        if value:
            raise ValueError("this server keeps no state between requests; send the whole conversation as input.")
        return value
