"""Request schemas of the supported part of the OpenAI API: fields, ranges, defaults.

None means absent. The fields marked "not in OpenAI's API" are additional features of `SamplingParams` and `Request`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from openmimo.engine.server.chat.schema import FunctionParameters, OutputSchema, check_tools
from openmimo.engine.server.http import limits
from openmimo.engine.server.http.bodies import check_counts, check_tree
from openmimo.engine.server.http.fields import (
    Fields,
    Label,
    LenientFields,
    Name,
    Penalty,
    Probability,
    StopText,
    Text,
    TokenId,
    few_entries,
    text_or,
)


class StreamOptions(Fields):
    """Additional contents of a stream.

    Attributes:
        include_usage: Whether a last chunk contains the token counts.
        continuous_usage_stats: Whether each chunk contains the token counts so far (not in OpenAI's API; vLLM's name).
        token_details: Whether each chunk contains the text of each token and whether an MTP layer drafted it (not in
            OpenAI's API).
        include_obfuscation: Accepted without effect.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    token_details: bool | None = None
    include_obfuscation: bool | None = None


def _check_grammar(grammar: str) -> str:
    if grammar.count(":") > limits.STRUCTURE_RULES:
        raise ValueError(f"it has more than {limits.STRUCTURE_RULES} rules.")
    return grammar


_GRAMMAR = AfterValidator(_check_grammar)


class StructuredOutputs(Fields):
    """The structure of the reply: exactly one of these fields (not in OpenAI's API)."""

    json_schema: OutputSchema | None = Field(None, alias="json")
    regex: Annotated[Text, Field(max_length=limits.STRUCTURE_CHARACTERS)] | None = None
    grammar: Annotated[Text, Field(max_length=limits.STRUCTURE_CHARACTERS), _GRAMMAR] | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=limits.CHOICES, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "StructuredOutputs":
        if sum(value is not None for value in (self.json_schema, self.regex, self.grammar, self.choice)) != 1:
            raise ValueError("give exactly one of json, regex, grammar and choice.")
        return self


class TemplateOptions(Fields):
    """Options of the chat template."""

    enable_thinking: bool | None = None
    keep_all_reasoning: bool = False


class CommonFields(Fields):
    """Fields of the generating endpoints."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "guided_choice": "give structured_outputs.choice.",
        "guided_grammar": "give structured_outputs.grammar.",
        "guided_json": "give structured_outputs.json.",
        "guided_regex": "give structured_outputs.regex.",
    }

    model: Name | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Probability | None = None

    # Not in OpenAI's API, or not in all of it.
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[
            Annotated[StopText, Tag("<text>")]
            | Annotated[list[StopText], Field(max_length=16, fail_fast=True), Tag("<texts>")],
            text_or("<texts>"),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]], few_entries(limits.BIASES)] | None
    ) = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # vLLM's clients send -1 for no limit
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    max_repeats: Annotated[int, Field(ge=0, le=1000)] | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    session: Annotated[Text, Field(max_length=limits.SHORT_CHARACTERS)] | None = None

    # Accepted because clients send them; they have no effect on a server with one model.
    user: Label | None = None
    metadata: Annotated[dict[Name, Label], few_entries(limits.LABELS)] | None = None
    store: bool | None = None
    service_tier: Name | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Name | None = None

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
            raise ValueError("it must be 0 (no limit) or at least 2.")
        return value


def _prompt_tag(value: Any) -> str | None:
    """Select the member of `Prompt` by the type of the first element."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "<texts>" if isinstance(first, str) else "<lists of ids>" if isinstance(first, list) else "<ids>"


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(min_length=1, max_length=limits.PROMPTS, fail_fast=True), Tag("<texts>")]
    | Annotated[list[TokenId], Field(min_length=1, fail_fast=True), Tag("<ids>")]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
        Field(min_length=1, max_length=limits.PROMPTS, fail_fast=True),
        Tag("<lists of ids>"),
    ],
    Discriminator(
        _prompt_tag,
        custom_error_type="prompt",
        custom_error_message="it must be a text, a list of texts, a list of token ids, or a list of such lists",
    ),
]


class CompletionRequest(CommonFields):
    """POST /v1/completions.

    Attributes:
        prompt_logprobs: Number of likeliest tokens to return at each position of the prompt (not in OpenAI's API; the
            name and format are vLLM's).
        parse_special: Whether names of special tokens in a prompt are encoded as those tokens, for clients that render
            the chat template themselves. Otherwise they are text. (Not in OpenAI's API; the name is llama.cpp's.)
    """

    unsupported: ClassVar[Mapping[str, str]] = {
        **CommonFields.unsupported,
        "suffix": "the model was not trained to fill in the middle.",
    }

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    parse_special: bool | None = None


class TextPart(LenientFields):
    """A text of a message."""

    type: Literal["text"]
    text: str


class InputAudio(LenientFields):
    """A recording.

    Attributes:
        data: The file in base64.
        format: Format of the file. Its content decides.
    """

    data: Text
    format: Literal["wav", "mp3", "flac", "ogg", "opus"]


class AudioPart(LenientFields):
    """A recording in a message. Models that hear accept it."""

    type: Literal["input_audio"]
    input_audio: InputAudio


def _part_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)  # a body, or its model
    return "<audio>" if kind == "input_audio" else "<text>"


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[AudioPart, Tag("<audio>")], Discriminator(_part_tag)
]


class AudioReference(LenientFields):
    """The sound of an earlier reply, which the server keeps for a time."""

    id: Label


class CalledFunction(LenientFields):
    """The function of a tool call.

    Attributes:
        name: Name of the function.
        arguments: A JSON object, or its text. The text of an incomplete call may be invalid JSON.
    """

    name: Text
    arguments: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[dict[str, Any], Tag("<object>")], text_or("<object>")
    ] = ""

    @field_validator("arguments")
    @classmethod
    def _is_bounded(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(value, str):
            check_counts(value.encode(), limits.SCHEMA_VALUES)
        else:
            check_tree(value, limits.SCHEMA_VALUES)
        return value


class ToolCall(LenientFields):
    """A tool call of an earlier turn of the model."""

    id: Label | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(LenientFields):
    """One turn of the conversation.

    Attributes:
        reasoning_content: The reasoning of that turn as the server returned it.
        audio: The sound of that turn.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag("<text>")]
            | Annotated[list[ContentPart], Field(max_length=limits.PARTS, fail_fast=True), Tag("<parts>")],
            text_or("<parts>"),
        ]
        | None
    ) = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.CALLS, fail_fast=True)] | None = None
    tool_call_id: Label | None = None
    audio: AudioReference | None = None


class FunctionSchema(Fields):
    """A function that the model may call. `strict` is accepted without effect: the schema is not enforced."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
    description: str | None = None
    parameters: FunctionParameters = None
    strict: bool | None = None


class Tool(Fields):
    """A tool of a chat request."""

    type: Literal["function"]
    function: FunctionSchema

    @property
    def parameters_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the arguments."""
        return self.function.parameters


Tools = Annotated[list[Tool], Field(max_length=limits.TOOLS, fail_fast=True), AfterValidator(check_tools)]


class FunctionName(Fields):
    """The name of a function."""

    name: Text


class NamedToolChoice(Fields):
    """The function that the model must call."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Fields):
    """The tools that the model may use, a selection of `tools`, and whether it must use one of them."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], Field(min_length=1, max_length=limits.TOOLS, fail_fast=True)]


class AllowedToolsChoice(Fields):
    """A selection of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _tool_choice_tag(value: Any) -> str:
    if isinstance(value, str):
        return "<text>"
    return "<allowed>" if isinstance(value, dict) and value.get("type") == "allowed_tools" else "<named>"


ToolMode = Annotated[Literal["none", "auto", "required", "any"], Tag("<text>")]  # any: required, in other APIs
ToolChoice = Annotated[
    ToolMode | Annotated[NamedToolChoice, Tag("<named>")] | Annotated[AllowedToolsChoice, Tag("<allowed>")],
    Discriminator(_tool_choice_tag),
]


class JsonSchemaFormat(Fields):
    """A JSON schema that the reply must match."""

    name: Name | None = None
    description: str | None = None
    json_schema: OutputSchema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """The format of the reply."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema must be set exactly if type is "json_schema".')
        return self


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=limits.MESSAGES, fail_fast=True)]


class VoiceId(Fields):
    """A voice by its id."""

    id: Name


Voice = Annotated[Annotated[Name, Tag("<text>")] | Annotated[VoiceId, Tag("<id>")], text_or("<id>")]


def voice_name(voice: str | VoiceId | None) -> str | None:
    """The name of a voice, which a request gives as a text or as an id."""
    return voice.id if isinstance(voice, VoiceId) else voice


class AudioOutput(Fields):
    """The sound of a reply. A stream has the format pcm16."""

    voice: Voice | None = None
    format: Literal["wav", "aac", "mp3", "flac", "opus", "pcm16"] = "wav"


class ChatRequest(CommonFields):
    """POST /v1/chat/completions.

    Attributes:
        add_generation_prompt: Whether the prompt ends with the beginning of an assistant turn (not in OpenAI's API).
        continue_final_message: Whether the reply continues the last message, an assistant turn (not in OpenAI's API;
            the name is vLLM's and transformers').
        prompt_logprobs: As in CompletionRequest.
    """

    unsupported: ClassVar[Mapping[str, str]] = {
        **CommonFields.unsupported,
        "function_call": "give tool_choice.",
        "functions": "give tools.",
    }

    messages: Messages
    audio: AudioOutput | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: ReasoningEffort | None = None
    modalities: Annotated[list[Literal["text", "audio"]], Field(min_length=1, max_length=8, fail_fast=True)] | None = (
        None
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: TemplateOptions | None = None
    return_token_ids: bool | None = None


class EmbeddingRequest(Fields):
    """POST /v1/embeddings.

    Attributes:
        dimensions: Accepted if it is the model's own number of dimensions.
        pooling: How the final states of an input's tokens become one vector: their mean, or that of the last token (not
            in OpenAI's API).
    """

    input: Prompt
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    pooling: Literal["mean", "last"] | None = None
    user: Label | None = None


class TokenizeRequest(Fields):
    """POST /tokenize: the token ids of a text, or of a conversation in the model's chat format.

    `parse_special` is that of CompletionRequest; `allow_special` is a synonym. A prompt that is the name of a special
    token, and nothing else, is that token.
    """

    model: Name | None = None
    prompt: str | None = None
    parse_special: bool = False
    allow_special: bool = False
    messages: Messages | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages.")
        return self


class DetokenizeRequest(Fields):
    """POST /detokenize: the text of token ids, including special tokens."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=limits.DETOKENIZED_TOKENS, fail_fast=True)]
