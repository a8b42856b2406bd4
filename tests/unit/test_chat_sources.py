"""The sources `tasks` and `chat`: rows of whole conversations whose loss covers the assistant's tokens only."""

import json
import warnings

import numpy as np
import pytest

from openmimo.core.config import from_dict, to_dict
from openmimo.core.errors import ConfigError, DataError
from openmimo.data.config import MixtureConfig, SourceConfig, TaskConfig, demonstrations
from openmimo.data.loader import Loader
from openmimo.data.source import open_source, split_of
from openmimo.data.sources.chat import pack
from openmimo.data.task import HELD_OUT_FRACTION
from openmimo.data.tokenizer import TURN_END, Tokenizer

TOKENIZER = Tokenizer.train(["system user assistant sort rev and some words"] * 20, 320)
TASKS = (TaskConfig("addition", 1, 2, weight=3.0), TaskConfig("reverse", 2, 6))


def rows_of(config: SourceConfig, number: int, sequence_length: int = 300):
    source, options = open_source(config)
    make_row = source.row_makers(options, TOKENIZER, sequence_length, 0.0).by_split["train"]
    return [make_row(np.random.default_rng(seed)) for seed in range(number)]


def documents_of(row):
    """Yields (text, text in the loss) of each document of a row."""
    edges = np.cumsum((0, *row.document_lengths))
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        token_ids, mask = row.token_ids[start:end], row.loss_mask[start:end]
        assert token_ids[-1] == TOKENIZER.end_of_text_id and not mask[-1]
        yield (
            TOKENIZER.decode(token_ids[:-1], skip_special=False),
            TOKENIZER.decode(token_ids[mask], skip_special=False),
        )


def demonstrations_of(config: SourceConfig, number: int) -> list[tuple[str, str]]:
    """Returns (prompt, answer) of every demonstration in the loss."""
    found = []
    for row in rows_of(config, number):
        *whole, (_, last_counts) = documents_of(row)
        for text, counted in whole if not last_counts else [*whole, list(documents_of(row))[-1]]:
            head, prompt, answer = text.split("<|im_start|>")[1:]
            assert head == f"system\n{TURN_END}"
            assert answer == f"assistant\n<think></think>{counted}"
            found.append((prompt.removeprefix("user\n").removesuffix(TURN_END), counted.removesuffix(TURN_END)))
    return found


def test_demonstrations_are_right_and_of_the_training_split():
    found = demonstrations_of(demonstrations(*TASKS), 60)
    assert len(found) > 300
    for prompt, answer in found:
        assert split_of(prompt, HELD_OUT_FRACTION) == "train"
        if prompt.startswith("rev "):
            assert answer == prompt.removeprefix("rev ")[::-1]
        else:
            assert int(answer[::-1]) == sum(map(int, prompt.split("+")))
    share = sum(prompt.startswith("rev ") for prompt, _ in found) / len(found)
    assert 0.15 < share < 0.35


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_noise_is_the_share_of_wrong_answers(noise):
    found = demonstrations_of(demonstrations(TaskConfig("reverse", 4, 4), noise=noise), 40)
    wrong = [answer for prompt, answer in found if answer != prompt.removeprefix("rev ")[::-1]]
    assert abs(len(wrong) / len(found) - noise) < 0.1
    assert all(len(answer) == 4 for answer in wrong)


def test_rows_are_full_and_little_of_them_is_wasted():
    rows = rows_of(demonstrations(*TASKS), 30)
    for row in rows:
        assert len(row.token_ids) == sum(row.document_lengths) == len(row.loss_mask) == 300
        counted = [bool(text) for _, text in documents_of(row)]
        assert all(counted[:-1])
    assert np.mean([row.loss_mask.mean() for row in rows]) > 0.1


def test_system_turn_is_shown():
    [row] = rows_of(demonstrations(*TASKS, system="Be brief."), 1)
    assert next(documents_of(row))[0].startswith(f"<|im_start|>system\nBe brief.{TURN_END}<|im_start|>user\n")


def test_task_sources_survive_json():
    config = demonstrations(*TASKS, noise=0.1)
    again = from_dict(SourceConfig, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert [row.token_ids.tolist() for row in rows_of(again, 3)] == [
        row.token_ids.tolist() for row in rows_of(config, 3)
    ]
    assert open_source(again)[1].tasks == TASKS


def test_a_loader_mixes_demonstrations_with_other_sources():
    mixture = MixtureConfig((demonstrations(*TASKS), SourceConfig("repeats")))
    batch = Loader(mixture, TOKENIZER, sequence_length=256, seed=0).next_batch(8)
    assert batch.loss_mask is not None and 0 < batch.loss_mask.sum() < len(batch.token_ids)


def test_impossible_demonstrations_are_refused():
    with pytest.raises(ConfigError, match="at least one task"):
        rows_of(demonstrations(), 1)
    with pytest.raises(ConfigError, match="noise is 1.5"):
        rows_of(demonstrations(*TASKS, noise=1.5), 1)
    with pytest.raises(ConfigError, match="no TaskFamily called 'nothing'"):
        rows_of(demonstrations(TaskConfig("nothing")), 1)
    with pytest.raises(DataError, match="cannot fit a demonstration of 'reverse' at difficulty 32"):
        rows_of(demonstrations(TaskConfig("reverse", 2, 32)), 1, sequence_length=64)


def conversation(number: int, *, words: int = 3, thoughts: str = "") -> dict:
    """A conversation of two questions."""
    turns = []
    for turn in range(2):
        turns.append({"role": "user", "content": f"question {number} {turn}"})
        answer = {"role": "assistant", "content": " ".join([f"answer {number} {turn}", *["word"] * words])}
        turns.append({**answer, "reasoning_content": f"{thoughts} {number} {turn}"} if thoughts else answer)
    return {"messages": [{"role": "system", "content": ""}, *turns]}


@pytest.fixture
def write(tmp_path):
    def write_lines(*conversations) -> SourceConfig:
        lines = "".join(json.dumps(line) + "\n" for line in conversations)
        (tmp_path / "chats.jsonl").write_text(lines)
        return SourceConfig("chat", options={"path": str(tmp_path)})

    return write_lines


def with_thinking(config: SourceConfig, thinking: str) -> SourceConfig:
    return SourceConfig("chat", options={**config.options, "thinking": thinking})


def counted_texts(config: SourceConfig, number: int = 60, sequence_length: int = 300) -> set[str]:
    return {counted for row in rows_of(config, number, sequence_length) for _, counted in documents_of(row) if counted}


def test_chat_rows_show_every_conversation_whole(write):
    config = write(*(conversation(number, words=number) for number in range(8)))
    expected = {
        "".join(f"answer {number} {turn}{' word' * number}{TURN_END}" for turn in range(2)) for number in range(8)
    }
    assert counted_texts(config) == expected
    assert counted_texts(with_thinking(config, "off")) == expected


def test_chat_rows_are_a_pure_function_of_the_generator(write):
    config = write(*(conversation(number, words=number) for number in range(8)))
    rows, again = rows_of(config, 20), rows_of(config, 20)
    assert [row.token_ids.tolist() for row in rows] == [row.token_ids.tolist() for row in again]
    assert len({row.token_ids.tobytes() for row in rows}) == len(rows)
    for row in rows:
        assert row.token_ids.dtype == np.int32 and sum(row.document_lengths) == len(row.token_ids) == 300
        ends = np.flatnonzero(row.token_ids == TOKENIZER.end_of_text_id)
        assert ends.tolist() == (np.cumsum(row.document_lengths) - 1).tolist()


def test_chat_conversations_are_equally_likely(write):
    config = write(*(conversation(number, words=4 * number) for number in range(6)))
    rows = rows_of(config, 400, 200)
    counts = [sum(f"answer {n} 0" in counted for row in rows for _, counted in documents_of(row)) for n in range(6)]
    assert min(counts) > 0.7 * max(counts)


def test_thoughts_make_one_example_for_each_question(write):
    config = write(conversation(0), conversation(1, thoughts="hm"))
    plain = f"answer 0 0 word word word{TURN_END}answer 0 1 word word word{TURN_END}"
    thoughtful = {f"<think>hm 1 {turn}</think>answer 1 {turn} word word word{TURN_END}" for turn in range(2)}
    assert counted_texts(config) == {plain} | thoughtful
    assert counted_texts(with_thinking(config, "off")) == {plain, plain.replace("answer 0", "answer 1")}
    without = {f"<think></think>answer 0 {turn} word word word{TURN_END}" for turn in range(2)}
    assert counted_texts(with_thinking(config, "on")) == without | thoughtful


def test_chat_with_tools_shows_them(write):
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [{"role": "user", "content": "Time?"}, {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "noon"}, {"role": "assistant", "content": "Noon."}]  # fmt: skip
    [row] = rows_of(write({"messages": messages, "tools": [tool]}), 1, 1000)
    text, counted = next(documents_of(row))
    assert "<name>clock</name>" in text and "noon" in text
    assert counted == f"<tool_call>\n<function=clock>\n</function>\n</tool_call>{TURN_END}Noon.{TURN_END}"


def test_long_conversations_are_left_out_and_counted(write):
    config = write(conversation(0), conversation(1, words=300))
    with pytest.warns(UserWarning, match="1 of 2 conversations are longer than 200 tokens"):
        assert len(counted_texts(config, 5, 200)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows_of(config, 1, 4000)
    with pytest.raises(DataError, match="no conversation in .* that fits into rows of 20 tokens"):
        rows_of(config, 1, 20)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"text": "x"}, "line 1: this is a line in the plain text format"),
        ({"messages": "x"}, "line 1: 'messages' must be a list"),
        ({"other": 1}, "line 1: the key 'messages' is missing .found: other"),
        ({"instruction": "a", "input": "", "output": "b"}, "line 1: .*Alpaca form.*user turn of 'instruction'"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "line 1: .*ShareGPT form.*'from' to 'role'"),
        ({"messages": ["x"]}, "line 1: Every message"),
        ({"messages": [{"content": "x"}]}, "line 1: .*no 'role'"),
        ({"messages": [{"role": "assistant", "content": "<|im_end|>"}]}, "line 1: .*control token"),
        ({"messages": [], "tools": {}}, "line 1: .*'tools'"),
        ([], "line 1: expected a JSON object"),
    ],
)
def test_bad_conversations_are_named(write, line, named):
    with pytest.raises(DataError, match=named):
        rows_of(write(line), 1)


def test_packing_puts_every_item_in_one_bin():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 101, size=rng.integers(1, 200)).tolist()
        bins = pack(lengths, 100)
        assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
        assert all(0 < sum(lengths[item] for item in items) <= 100 for items in bins)
        assert len(bins) <= 1.25 * sum(lengths) / 100 + 1 or min(lengths) > 25
    assert pack([60, 40, 50, 50], 100) == [[0, 1], [2, 3]]
