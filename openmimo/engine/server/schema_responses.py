"""The request of OpenAI's Responses API, as far as this server answers it."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from openmimo.engine.server.schema import (
    CommonFields,
    Fields,
    FunctionParameters,
    LenientFields,
    TemplateOptions,
    Text,
)


class TextPart(LenientFields):
    """A part of a message. Only text can be read."""

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str


class MessageItem(LenientFields):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None


class ReasoningItem(LenientFields):
    """What the model thought in an earlier turn, as the server gave it."""

    type: Literal["reasoning"]
    content: list[TextPart] | None = None


class FunctionCallItem(LenientFields):
    """A call that the model made in an earlier turn; arguments: as the server gave them."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: str


class FunctionOutputItem(LenientFields):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Text
    output: str | list[TextPart]


def _tag(item: Any) -> str | None:
    """The member of `InputItem` that an item means to be. OpenAI lets messages do without a type."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    return _TAGS.get(kind) if isinstance(kind, str) else None


# Tags begin with a capital so that errors can tell them from fields.
_TAGS = {
    "message": "Message",
    "reasoning": "Reasoning",
    "function_call": "FunctionCall",
    "function_call_output": "FunctionOutput",
}
InputItem = Annotated[
    Annotated[MessageItem, Tag("Message")]
    | Annotated[ReasoningItem, Tag("Reasoning")]
    | Annotated[FunctionCallItem, Tag("FunctionCall")]
    | Annotated[FunctionOutputItem, Tag("FunctionOutput")],
    Discriminator(
        _tag,
        custom_error_type="input_item",
        custom_error_message="an item is an object of type message, reasoning, function_call or function_call_output",
    ),
]


class ResponseTool(Fields):
    """A function that the model may call. strict: accepted; arguments follow the schema as well as the model can."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
    description: str | None = None
    parameters: FunctionParameters = None
    strict: bool | None = None


class ResponseToolChoice(Fields):
    """The one function to call."""

    type: Literal["function"]
    name: Text


class TextFormat(Fields):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('schema belongs to type "json_schema", and that type needs it.')
        return self


class TextOptions(Fields):
    """What the text is to be like."""

    format: TextFormat | None = None


class ReasoningOptions(Fields):
    """How much the model thinks. summary: accepted; the reasoning is given whole."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: str | None = None


class ResponseStreamOptions(Fields):
    """include_obfuscation: accepted; nothing is obfuscated."""

    include_obfuscation: bool | None = None


class ResponseRequest(CommonFields):
    """POST /v1/responses.

    The server keeps no state: the conversation comes whole in `input`, and previous_response_id, conversation and
    background are refused.
    """

    input: Text | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None  # reasoning is given in the open
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: TemplateOptions | None = None
    truncation: str | None = None
    previous_response_id: str | None = None
    conversation: JsonValue | None = None
    background: bool | None = None

    @field_validator("truncation")
    @classmethod
    def _not_shortened(cls, value: str | None) -> str | None:
        if value not in (None, "disabled"):
            raise ValueError("conversations are not shortened here; leave it out.")
        return value

    @field_validator("previous_response_id", "conversation", "background")
    @classmethod
    def _keeps_no_state(cls, value: Any) -> Any:
        if value:
            raise ValueError("this server keeps no state between requests; send the whole conversation as input.")
        return value
