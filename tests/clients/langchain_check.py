"""langchain: chats, structured output, agents with a tool and a form, embeddings."""

from checks import KEY, MODEL, Served, check, main
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int


class Size(BaseModel):
    """A size."""

    size: int = Field(ge=0, le=99)


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"4 degrees in {city}"


def chat(url: str, **options: object) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key=KEY, max_retries=0, **options)


@check("langchain chat, streamed and whole")
def _(served: Served) -> None:
    model = chat(served.url, temperature=0, max_tokens=12)
    assert "".join(chunk.text for chunk in model.stream("hello")) == model.invoke("hello").text


@check("langchain structured output")
def _(served: Served) -> None:
    model = chat(served.url, temperature=0.2, max_tokens=200, seed=1).with_structured_output(Size, method="json_schema")
    assert isinstance(model.invoke("hello"), Size)


for use_responses in (False, True):

    @check(f"langchain agent with ProviderStrategy{', responses' if use_responses else ''}")
    def _(served: Served, use_responses: bool = use_responses) -> None:
        model = chat(served.scripted_url, use_responses_api=use_responses)
        agent = create_agent(model, tools=[get_weather], response_format=ProviderStrategy(Weather))
        state = agent.invoke({"messages": [{"role": "user", "content": "weather in Oslo?"}]})
        assert state["structured_response"] == Weather(city="Oslo", degrees=4)


@check("langchain embeddings")
def _(served: Served) -> None:
    model = OpenAIEmbeddings(
        model=MODEL, base_url=f"{served.url}/v1", api_key=KEY, check_embedding_ctx_length=False, max_retries=0
    )
    vectors = model.embed_documents([f"text {number}" for number in range(300)])
    assert len(vectors) == 300 and len({len(vector) for vector in vectors}) == 1


main("langchain", "langchain-openai")
