"""The requests of the OpenAI API that this server answers: fields, ranges, defaults.

A field that this server does not know is refused by its name. None is as good as absent. Fields under "not in OpenAI's
API" are what `SamplingParams` and `Request` offer beyond it.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Text = Annotated[str, Field(min_length=1)]


class Fields(BaseModel):
    """A JSON object whose every field is known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class LenientFields(BaseModel):
    """A JSON object that clients send back as they got it, so unknown fields (refusal, annotations) mean nothing."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class StreamOptions(Fields):
    """What a stream carries beside the reply.

    include_usage: a last chunk with the token counts. token_details (not in OpenAI's API): in each chunk, the text of
    each token and whether an MTP head had drafted it. include_obfuscation: accepted; nothing is obfuscated.
    """

    include_usage: bool = False
    token_details: bool = False
    include_obfuscation: bool | None = None


class StructuredOutputs(Fields):
    """What the text must look like: exactly one of these (not in OpenAI's API)."""

    json_schema: dict[str, JsonValue] | None = Field(None, alias="json")
    regex: Text | None = None
    grammar: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "StructuredOutputs":
        if sum(value is not None for value in (self.json_schema, self.regex, self.grammar, self.choice)) != 1:
            raise ValueError("give exactly one of json, regex, grammar and choice.")
        return self


class TemplateOptions(Fields):
    """What the chat template is told."""

    enable_thinking: bool | None = None
    keep_all_reasoning: bool = False


class CommonFields(Fields):
    """What all three generating endpoints take."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Probability | None = None

    # Not in OpenAI's API, or not in all of it.
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    max_repeats: Annotated[int, Field(ge=0, le=1000)] | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    session: Text | None = None

    # Accepted because clients send them; with one model on one server they change nothing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"the keys must be token ids, not {key!r}.")
        return value

    @field_validator("max_repeats")
    @classmethod
    def _repeats(cls, value: int | None) -> int | None:
        if value == 1:
            raise ValueError("it must be 0 (never) or at least 2.")
        return value


class CompletionRequest(CommonFields):
    """POST /v1/completions. `suffix` is not offered: the model was not trained to fill in the middle.

    parse_special (not in OpenAI's API; llama.cpp's name): the names of special tokens in a prompt become those tokens,
    for clients that render the chat template themselves. Otherwise they are text.
    """

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    parse_special: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if isinstance(value, list) and (not value or any(prompt == [] for prompt in value)):
            raise ValueError("it must not be empty.")
        return value


class ContentPart(LenientFields):
    """A part of a message. Only text can be read."""

    type: Literal["text"]
    text: str


class CalledFunction(LenientFields):
    """What a tool call calls; arguments: a JSON object, as text or as it is. A call that was cut off has other text."""

    name: Text
    arguments: str | dict[str, JsonValue] = ""


class ToolCall(LenientFields):
    """A call that the model made in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(LenientFields):
    """One turn of the conversation. reasoning_content: what the model thought in that turn, as the server gave it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


def _check_properties(parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    properties = (parameters or {}).get("properties") or {}
    if not isinstance(properties, dict) or not all(isinstance(one, dict | bool) for one in properties.values()):
        raise ValueError("properties must be an object that gives each parameter's schema, an object or a boolean.")
    return parameters


FunctionParameters = Annotated[dict[str, JsonValue] | None, AfterValidator(_check_properties)]


class FunctionSchema(Fields):
    """A function that the model may call. strict: accepted; arguments follow the schema as well as the model can."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
    description: str | None = None
    parameters: FunctionParameters = None
    strict: bool | None = None


class Tool(Fields):
    """A tool of a chat."""

    type: Literal["function"]
    function: FunctionSchema


class FunctionName(Fields):
    """The name of a function."""

    name: Text


class NamedToolChoice(Fields):
    """The one function to call."""

    type: Literal["function"]
    function: FunctionName


class JsonSchemaFormat(Fields):
    """A JSON schema that the reply must follow."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """The form of the reply."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema belongs to type "json_schema", and that type needs it.')
        return self


class ChatRequest(CommonFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    modalities: list[Literal["text"]] | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: TemplateOptions | None = None
    return_token_ids: bool | None = None


class TokenizeRequest(Fields):
    """POST /tokenize: the ids of a text, or of a conversation in the model's chat format."""

    model: str | None = None
    prompt: str | None = None
    allow_special: bool = Field(False, validation_alias=AliasChoices("parse_special", "allow_special"))
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages.")
        return self


class DetokenizeRequest(Fields):
    """POST /detokenize: the text of token ids, special tokens included."""

    model: str | None = None
    tokens: list[TokenId]
