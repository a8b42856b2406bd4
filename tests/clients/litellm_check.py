"""litellm and instructor."""

import instructor
import litellm
from checks import KEY, MODEL, Served, check, main
from openai import OpenAI
from pydantic import BaseModel

HELLO = [{"role": "user", "content": "weather in Oslo?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Weather(BaseModel):
    city: str
    degrees: int


class GetWeather(BaseModel):
    city: str


@check("litellm chat, streamed and whole")
def _(served: Served) -> None:
    ask = {"model": f"openai/{MODEL}", "api_base": f"{served.url}/v1", "api_key": KEY, "max_tokens": 12}
    whole = litellm.completion(messages=HELLO, temperature=0, **ask).choices[0].message.content
    parts = [part.choices[0].delta.content for part in litellm.completion(
        messages=HELLO, temperature=0, stream=True, **ask)]  # fmt: skip
    assert "".join(part or "" for part in parts) == whole


@check("litellm vllm provider, tools")
def _(served: Served) -> None:
    ask = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{served.scripted_url}/v1", "api_key": KEY, "tools": [TOOL]}
    call = litellm.completion(messages=HELLO, **ask).choices[0].message.tool_calls[0]
    assert call.function.arguments == '{"city": "Oslo"}'


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS):

    @check(f"instructor {mode.name}")
    def _(served: Served, mode: instructor.Mode = mode) -> None:
        client = instructor.from_openai(OpenAI(base_url=f"{served.scripted_url}/v1", api_key=KEY), mode=mode)
        is_call = mode != instructor.Mode.JSON_SCHEMA  # the script's call has one argument
        form = GetWeather if is_call else Weather
        reply = client.chat.completions.create(model=MODEL, messages=HELLO, response_model=form, max_retries=0)
        assert reply.model_dump() == ({"city": "Oslo"} if is_call else {"city": "Oslo", "degrees": 4})


main("litellm", "instructor")
