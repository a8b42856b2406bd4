"""pydantic-ai: agents with a tool and a form, by the server's grammar, by a tool, and by the prompt."""

from checks import KEY, MODEL, Served, check, main
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    city: str
    degrees: int


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"4 degrees in {city}"


for model in (OpenAIChatModel, OpenAIResponsesModel):
    for kind in (NativeOutput, ToolOutput):

        @check(f"pydantic-ai tools with {kind.__name__}, {model.__name__}")
        def _(served: Served, model: type = model, kind: type = kind) -> None:
            provider = OpenAIProvider(base_url=f"{served.scripted_url}/v1", api_key=KEY)
            agent = Agent(model(MODEL, provider=provider), output_type=kind(Weather), tools=[get_weather])
            assert agent.run_sync("weather in Oslo?").output == Weather(city="Oslo", degrees=4)


main("pydantic-ai-slim")
