"""Chat tool calls and context management: reading calls from a turn, and conversations that exceed the context."""

import pytest
from environment_players import call, play

from openmimo.core.errors import ConfigError
from openmimo.core.records import Message
from openmimo.data.tokenizer import Tokenizer
from openmimo.rl.agents.chat_tools import ChatToolEpisode, function_tool, read_reply
from openmimo.rl.agents.context_management import ContextLimits, ManagedEpisode
from openmimo.rl.agents.environment import EnvResponse
from openmimo.rl.rollouts.engine import turn_ids
from openmimo.rl.toolbox import ToolMistakeError

TOOLS = (
    function_tool("look", "Looks.", {"place": ("string", "where"), "times": ("integer", "how often")}),
    function_tool("stop", "Stops.", {}),
)


class Looking(ChatToolEpisode):
    """Returns a long text for every place but one."""

    def __init__(self, max_calls=10):
        super().__init__((Message("system", "Be brief."), Message("user", "Find it.")), TOOLS, max_calls)
        self.archived, self.num_closed = {}, 0

    def run(self, name, arguments):
        if name == "stop":
            self.is_over = True
            return "never returned"
        if arguments["place"] == "nowhere":
            raise ToolMistakeError("there is nothing")
        return self.archived.get(arguments["place"]) or f"{arguments['place']}: " + "x" * 100

    def archive(self, name, text):
        self.archived[name] = text
        return f"Look at {name}."

    def reward(self):
        return float(self.content == "found")

    def close(self):
        self.num_closed += 1


def test_calls_are_read_with_their_types():
    reply = read_reply("Well.\n" + call("look", place="12", times="3") + "\n" + call("stop"), TOOLS)
    assert [(one.name, one.arguments, one.error) for one in reply.calls] == [
        ("look", {"place": "12", "times": 3}, ""),
        ("stop", {}, ""),
    ]
    assert reply.content == "Well."
    assert read_reply("<think>hm</think>no", TOOLS).content == "no"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (call("look", place="a"), "lacks times"),
        (call("look", place="a", times="many"), "type integer"),
        (call("look", place="a", times="true"), "type integer"),
        (call("stop", now="yes"), "no parameter now"),
        (call("leap"), "no function 'leap'"),
        (call("look", place="a", times="1").removesuffix("</function>\n</tool_call>"), "no end"),
        ("<tool_call>look(a)</tool_call>", "malformed"),
        ("<function=look>", "malformed"),
    ],
)
def test_the_fault_of_a_call_is_reported(text, error):
    answer = Looking().respond(text)
    assert len(answer.messages) == 1
    assert answer.messages[0].role == "tool"
    assert answer.messages[0].content.startswith("error: ")
    assert error in answer.messages[0].content


def test_several_calls_have_several_answers():
    episode = Looking()
    answer = episode.respond(call("look", place="a", times="1") + call("look", place="nowhere", times="1"))
    assert [turn.content[:7] for turn in answer.messages] == ["a: xxxx", "error: "]
    assert episode.respond(call("look", place="a", times="1") + call("stop") + call("stop")) == EnvResponse()


def test_the_last_call_says_so_and_then_it_is_over():
    episode = Looking(max_calls=2)
    answer = episode.respond(call("leap") + call("look", place="a", times="1") + call("stop"))
    assert [turn.content.splitlines()[-1] for turn in answer.messages] == [
        "error: there is no function 'leap'; there are look, stop",
        "(no call is left; answer now)",
        "error: no call is left; answer now",
    ]
    assert episode.respond(call("stop")).is_last


def test_answers_fit_the_chat_template():
    tokenizer = Tokenizer.train(["some words and a few more words"] * 50, 300)
    answer = Looking().respond(call("look", place="a", times="1") + call("leap"))
    text = tokenizer.decode(turn_ids(tokenizer, answer.messages), skip_special=False)
    assert text.count("<tool_response>") == 2


def test_a_short_conversation_is_left_alone():
    episode = ManagedEpisode(Looking(), ContextLimits(max_length=10_000))
    assert episode.respond(call("look", place="a", times="1")).messages
    assert episode.successor() is None
    assert episode.respond("found") == EnvResponse()
    assert (episode.reward(), episode.successor()) == (1.0, None)


def test_a_long_conversation_goes_on_in_a_new_one():
    inner = Looking()
    first = ManagedEpisode(inner, ContextLimits(max_length=1000, share=0.3))
    assert not first.respond(call("look", place="a", times="1")).is_last
    assert first.respond(call("look", place="b", times="1")).is_last
    assert first.reward() == 0.0
    second = first.successor()
    first.close()
    assert inner.num_closed == 0
    system, task = second.messages
    assert system.content == "Be brief."
    assert task.content.startswith("Find it.\n\nThis goes on")
    assert "Look at history-1." in task.content
    assert "a: xxx" in task.content
    assert "b: xxx" in task.content
    assert second.tools == first.tools
    assert play(second, iter_script(call("look", place="history-1", times="1"))) == 0.0
    history = second.successor().messages[-1].content
    assert "history-2" in history
    assert "[assistant]\n<tool_call>" in inner.archived["history-1"]
    assert "b: xxx" in inner.archived["history-1"]


def iter_script(*texts):
    yield from texts


def test_whoever_has_the_last_part_closes():
    inner = Looking()
    first = ManagedEpisode(inner, ContextLimits(max_length=100, share=0.3))
    first.respond(call("look", place="a", times="1"))
    first.close()  # no successor was requested
    assert inner.num_closed == 1
    second = first.successor()
    second.close()
    assert inner.num_closed == 2


def test_the_summary_is_pluggable():
    limits = ContextLimits(max_length=40, share=1.0, measure=lambda text: len(text.split()))
    inner = Looking()
    first = ManagedEpisode(inner, limits, lambda history: f"{len(history)} turns so far")
    for _ in range(20):
        if first.respond(call("look", place="a b c", times="1")).is_last:
            break
    assert "turns so far" in first.successor().messages[-1].content


@pytest.mark.parametrize("wrong", [{"max_length": 0}, {"max_length": 5, "share": 0.0}, {"max_length": 5, "share": 1.5}])
def test_context_limits_are_checked(wrong):
    with pytest.raises(ConfigError, match="ContextLimits"):
        ContextLimits(**wrong)
