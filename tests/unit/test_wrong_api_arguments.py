"""Wrong types and values in the Python API raise a UserError that names the argument, and no file is written."""

from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config, tiny_model

import openmimo
from openmimo.core.errors import UserError
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.mimo import MiMo


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["some words and some more words"] * 30, 300)


@pytest.fixture(scope="module")
def llm(tokenizer):
    config = replace(tiny_config(num_layers=2), vocab_size=tokenizer.vocab_size)
    return openmimo.LLM(randomize(MiMo(config), 0), tokenizer)


@pytest.mark.parametrize("path", [None, 3, b"x", "", "a\0b", ["x"]], ids=repr)
def test_a_path_that_is_none(path, model):
    for call in (lambda: openmimo.load_model(path), lambda: openmimo.save_model(model, path)):
        with pytest.raises(UserError, match="path"):
            call()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("dtype", None), ("dtype", torch.float32), ("dtype", "int8"), ("device", 3), ("device", "gpu!"), ("device", None),
     ("window_keys", "x"), ("window_keys", 1.5), ("window_keys", -1)],
    ids=repr,
)  # fmt: skip
def test_loading(argument, value, model, tmp_path):
    openmimo.save_model(model, tmp_path / "model")
    with pytest.raises(UserError, match=argument):
        openmimo.load_model(tmp_path / "model", **{argument: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [("model", None), ("model", "x"), ("tokenizer", "x"), ("max_shard_bytes", 0), ("max_shard_bytes", -1),
     ("max_shard_bytes", 1.5), ("max_shard_bytes", True), ("max_shard_bytes", "x")],
    ids=repr,
)  # fmt: skip
def test_saving(argument, value, model, tmp_path):
    with pytest.raises(UserError, match=argument):
        openmimo.save_model(**{"model": model, "path": tmp_path / "model", argument: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "ids",
    [torch.zeros(3), torch.zeros(2, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.tensor(1),
     torch.tensor([-1]), torch.tensor([10**6]), [1, 2], "x", None, torch.zeros(3, dtype=torch.bool)],
    ids=lambda ids: str(ids).replace("\n", ""),
)  # fmt: skip
def test_logits_of_what_is_no_sequence(ids, model):
    with pytest.raises(UserError, match="token_ids"):
        model.logits(ids)


PROMPTS = (None, 3, 1.5, b"x", [None], [[]], [["x"]], [[-1]], [[10**6]], [[1.5]], ["\ud800"])


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("method", ["generate", "score", "stream"])
def test_prompts(method, prompt, llm):
    with pytest.raises(UserError, match="prompt|token"):
        result = getattr(llm, method)(prompt)
        list(result)


@pytest.mark.parametrize("params", ["x", 3, {}, [openmimo.SamplingParams()] * 3], ids=str)
def test_sampling_params_of_another_type(params, llm):
    with pytest.raises(UserError, match="params|Params"):
        llm.generate(["some words"], params)
