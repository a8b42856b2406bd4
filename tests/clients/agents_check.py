"""openai-agents: an agent with a tool and a form, on both APIs of the server."""

import asyncio

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from checks import KEY, MODEL, Served, check, main
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)


class Weather(BaseModel):
    city: str
    degrees: int


@function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"4 degrees in {city}"


def run(served: Served, kind: type, *, streamed: bool) -> None:
    async def answer() -> object:
        model = kind(model=MODEL, openai_client=AsyncOpenAI(base_url=f"{served.scripted_url}/v1", api_key=KEY))
        agent = Agent(name="weather", instructions="Use tools.", model=model, tools=[get_weather], output_type=Weather)
        if not streamed:
            return (await Runner.run(agent, "weather in Oslo?")).final_output
        result = Runner.run_streamed(agent, "weather in Oslo?")
        async for _ in result.stream_events():
            pass
        return result.final_output

    assert asyncio.run(answer()) == Weather(city="Oslo", degrees=4)


for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
    for streamed in (False, True):

        @check(f"openai-agents tools with output_type, {kind.__name__}{', streamed' if streamed else ''}")
        def _(served: Served, kind: type = kind, streamed: bool = streamed) -> None:
            run(served, kind, streamed=streamed)


main("openai-agents")
