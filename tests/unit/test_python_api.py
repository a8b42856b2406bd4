"""Wrong arguments of the Python API raise a UserError that names the argument."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomize, tiny_config

import openmimo
from openmimo.core.errors import UserError
from openmimo.core.records import Message, SamplingParams, Structure
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.llm import LLM
from openmimo.evals.config import EvalConfig
from openmimo.model.hf import load_model
from openmimo.model.mimo import MiMo

TOKENIZER = Tokenizer.train(["some words to learn from, 12 and 34"], vocab_size=300)
NAN, INFINITE = math.nan, math.inf


@pytest.fixture(scope="module")
def llm():
    config = replace(tiny_config(), vocab_size=TOKENIZER.vocab_size, max_positions=64)
    return LLM(randomize(MiMo(config), 0), TOKENIZER)


WRONG_PARAMS = [
    *({"max_tokens": value} for value in (0, -1, 1.5, "8", True, None, NAN, [4], np.float64(4))),
    *({"min_tokens": value} for value in (-1, 200, 1.5, "1")),
    *({"logit_bias": value} for value in ({"5": 1}, {-5: 1}, {5: 101}, {5: NAN}, {5: "1"}, {1.5: 1}, None, [1], 5)),
    *({"temperature": value} for value in (-1, NAN, INFINITE, "1", True, None, 1e-6, 10**400)),
    *({name: value} for name in ("presence_penalty", "frequency_penalty") for value in (NAN, 3, "0", True)),
    *({"repetition_penalty": value} for value in (0, NAN, INFINITE, "1")),
    *({"top_p": value} for value in (0, 1.1, NAN, "1", True)),
    *({"min_p": value} for value in (-0.1, 1.1, NAN)),
    *({"top_k": value} for value in (-1, 1.5, "1", True)),
    *({"seed": value} for value in (1.5, -1, 2**63, 10**40, "1", True, NAN)),
    *({"stop": value} for value in (("a", 5), ("",), "", b"a", None, 5, {"a"})),
    *({"stop_token_ids": value} for value in ((-1,), ("1",), (1.0,), (True,), 5, None)),
    *({"max_repeats": value} for value in (1, -1, 2.5)),
    *({"structure": value} for value in ("x", 5)),
    *({"top_logprobs": value} for value in (-1, 21, 1.5, True)),
    *({name: 1} for name in ("ignore_eos", "skip_special_tokens", "logprobs", "prompt_logprobs", "routed_experts")),
]


@pytest.mark.parametrize("fields", WRONG_PARAMS, ids=str)
def test_sampling_params_name_the_wrong_field(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        SamplingParams(**fields)


def test_numpy_numbers_are_numbers_and_one_stop_string_is_one():
    params = SamplingParams(max_tokens=np.int32(4), temperature=np.float32(0.5), top_k=np.int64(3), stop="Return")
    assert (params.max_tokens, params.temperature, params.top_k, params.stop) == (4, 0.5, 3, ("Return",))
    assert type(params.max_tokens) is int and type(params.temperature) is float
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_one_stop_string_ends_the_text_as_a_whole(llm):
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    text = llm.generate("some words", params)[0].text
    stop = text[len(text) // 2 :][:3]
    assert llm.generate("some words", replace(params, stop=stop))[0].text == text[: text.index(stop)]


PROMPTS = [
    None, 5, 1.5, b"some words", {"a": 1}, {1, 2}, iter(["a"]), [5], [1, 2], [None], [b"a"], [[]], [[1.0]], [["1"]],
    [[True]], [[-1]], [[TOKENIZER.vocab_size]], [[2**70]], [[1], None], [[[1]]], [[1] * 64], ["\ud800"], [{1}], [""],
    [torch.tensor([[1]])], [torch.tensor([1.5])], [np.array([1.0])],
]  # fmt: skip


@pytest.mark.parametrize("prompts", PROMPTS, ids=map(str, range(len(PROMPTS))))
def test_generate_names_the_wrong_prompt(llm, prompts):
    with pytest.raises(UserError, match="prompt"):
        llm.generate(prompts, SamplingParams(max_tokens=1))


@pytest.mark.parametrize("prompt", [None, 5, b"a", [], [1.5], [-1], [True], [[1]], ["a"], "\udfff"], ids=str)
def test_stream_names_the_wrong_prompt(llm, prompt):
    with pytest.raises(UserError, match="prompt"):
        llm.stream(prompt)


@pytest.mark.parametrize("params", [5, "a", {"max_tokens": 4}, [None, 5], [SamplingParams()] * 3, 0, []], ids=str)
def test_params_of_another_kind_are_refused(llm, params):
    with pytest.raises(UserError, match=r"params|SamplingParams"):
        llm.generate([[1], [2]], params)
    if not isinstance(params, list):
        with pytest.raises(UserError, match="params"):
            llm.stream([1], params)


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_ids_outside_the_vocabulary_name_their_field(llm, field):
    value = {TOKENIZER.vocab_size: 1.0} if field == "logit_bias" else (TOKENIZER.vocab_size,)
    with pytest.raises(UserError, match=f"{field} names id {TOKENIZER.vocab_size}"):
        llm.generate([[1]], SamplingParams(**{field: value}))


def test_arrays_of_ids_are_prompts(llm):
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    expected = llm.generate([[1, 2, 3]], params)[0].token_ids
    for prompt in (torch.tensor([1, 2, 3]), np.array([1, 2, 3]), (1, 2, 3), [np.int64(1), 2, np.uint8(3)]):
        assert llm.generate([prompt], params)[0].token_ids == expected
    assert llm.generate([], params) == []


@pytest.mark.parametrize(
    "token_ids",
    [None, 5, "text", b"a", [], [1.5], [True], [-1], [300], [[1]], {1}, torch.tensor(5), torch.tensor([1.5])],
    ids=str,
)
def test_score_names_token_ids(llm, token_ids):
    with pytest.raises(UserError, match="token_ids"):
        llm.score(token_ids)


@pytest.mark.parametrize(
    "token_ids",
    [None, [1], torch.tensor([]), torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([-1]), torch.tensor([300])],
    ids=str,
)
def test_logits_name_token_ids(llm, token_ids):
    with pytest.raises(UserError, match="token_ids"):
        llm.model.logits(token_ids)


WRONG_LLM = [
    *({name: value} for name in ("max_sequences", "prefill_tokens") for value in (0, -1, 1.5, "8", True, None)),
    *({"cache_gigabytes": value} for value in (0, -1, NAN, INFINITE, "1", True, 1e9)),
    *({name: value} for name in ("speculative", "prefix_cache", "adaptive_drafts", "int8") for value in (1, "no")),
    *({"num_drafts": value} for value in (0, 1, 1.5, "1", True)),
    *({"tokenizer": value} for value in ("path", 5)),
]


@pytest.mark.parametrize("arguments", WRONG_LLM, ids=str)
def test_llm_names_the_wrong_argument(llm, arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        LLM(llm.model, **arguments)


@pytest.mark.parametrize("model", [None, 5, b"path", ["a"], torch.nn.Linear(1, 1)], ids=str)
def test_llm_names_a_wrong_model(model):
    with pytest.raises(UserError, match="model"):
        LLM(model)


@pytest.fixture(scope="module")
def folder(llm, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    openmimo.save_model(llm.model, path)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        *({"dtype": value} for value in ("float", None, 5, ["float32"], torch.int8)),
        *({"device": value} for value in ("gpu", None, 5, ["cpu"], "meta", "cuda:99", "", b"cpu")),
    ],
    ids=str,
)
def test_loading_names_dtype_and_device(folder, arguments):
    for load in (load_model, LLM):
        with pytest.raises(UserError, match=next(iter(arguments))):
            load(folder, **arguments)


@pytest.mark.parametrize("path", [None, 5, b"path", ["a"]], ids=str)
def test_loading_names_the_path(path):
    with pytest.raises(UserError, match="path"):
        load_model(path)


@pytest.mark.parametrize("name", ["mixed_prefill_tokens", "cache_dtype"])
@pytest.mark.parametrize("value", [0, "int3", None, True])
def test_engine_config_names_the_field(name, value):
    with pytest.raises(UserError, match=f"EngineConfig.{name}"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    "fields",
    [
        *({"lengths": value} for value in ((), (0,), (-1,), (1.5,), 64, "64", None)),
        *({name: value} for name in ("examples", "batch") for value in (0, -1, 1.5, "1", True)),
        *({"seed": value} for value in (-1, 1.5)),
        *({name: 5} for name in ("path", "task", "device", "dtype", "options", "output")),
    ],
    ids=str,
)
def test_eval_config_names_the_field(fields):
    with pytest.raises(UserError, match=f"EvalConfig.{next(iter(fields))}"):
        EvalConfig(**{"path": "somewhere", **fields})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Message(5),
        lambda: Message("user", None),
        lambda: Message("user", "hi", tool_calls="x"),
        lambda: Structure("regex", 5),
        lambda: Structure(5),
    ],
)
def test_records_name_the_field(make):
    with pytest.raises(UserError, match=r"Message\.|Structure\."):
        make()


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(UserError, match="tokenizer"):
        Engine(MiMo(tiny_config()), TOKENIZER)
