"""A request that the engine cannot finish ends with a clear error, other requests continue, commands exit 1."""

import math
import sys

import pytest
import torch
from server_thread import connect, running
from tiny_checkpoint import save_tiny_checkpoint

from openmimo import cli
from openmimo.core.errors import UserError
from openmimo.core.records import SamplingParams, Structure
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.engine.llm import LLM
from openmimo.engine.server.backends.engine import EngineBackend
from openmimo.model.hf import load_model, save_model

LARGE = Structure("regex", "([a-z]{1,40} ?){200,300}")
SMALL = Structure("regex", "(yes|no), [0-9]{3}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module", params=["lm_head", "one number of a layer", "an MTP head"])
def damaged(request, folder, tmp_path_factory):
    """The checkpoint with NaN weights."""
    path = tmp_path_factory.mktemp("damaged") / "model"
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    with torch.no_grad():
        if request.param == "lm_head":
            model.lm_head.weight.fill_(math.nan)
        elif request.param == "an MTP head":
            model.model.mtp.layers[0].eh_proj.weight.fill_(math.nan)
            model.model.norm.weight.fill_(math.inf)
        else:
            model.model.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
    save_model(model, path)
    tokenizer.save(path)
    return path


def test_every_way_to_generate_says_that_weights_are_not_finite(damaged):
    llm = LLM(damaged)
    params = SamplingParams(max_tokens=8)
    done = llm.generate(["hi"], params)[0]
    assert done.finish_reason == "error" and "not finite" in done.error and not done.token_ids
    with pytest.raises(UserError, match="not finite"):
        list(llm.stream("hi", params))
    with pytest.raises(UserError, match="not finite"):
        llm.score([1, 2, 3])
    done = llm.generate(["hi there"], SamplingParams(max_tokens=8, prompt_logprobs=True, temperature=0.0))[0]
    assert done.finish_reason == "error" and "not finite" in done.error


def test_a_prompt_whose_log_probabilities_are_not_finite_ends_alone(folder):
    """One embedding is NaN: only prompts with that token fail."""
    model = load_model(folder)
    model.model.embed_tokens.weight.data[7] = math.nan
    llm = LLM(model)
    params = SamplingParams(max_tokens=4, prompt_logprobs=True, ignore_eos=True)
    bad, good = llm.generate([[7, *range(20, 60)], list(range(20, 60))], params)
    assert bad.finish_reason == "error" and "not finite" in bad.error
    assert good.finish_reason == "length" and len(good.prompt_logprobs) == 39


@pytest.mark.parametrize(
    "command",
    [["generate", "--prompt", "hi"], ["generate", "--chat", "--prompt", "hi"], ["chat"], ["eval"]],
    ids=" ".join,
)
def test_commands_say_it_and_exit_1(damaged, command, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "hi")
    extra = ["--lengths", "64", "--examples", "2"] if command == ["eval"] else ["--max-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["openmimo", command[0], str(damaged), *command[1:], *extra])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and "not finite" in err and "Traceback" not in err
    assert not out.strip() and (out == "" or command == ["chat"])


@pytest.mark.parametrize("speculative", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_limit_of_the_grammar_ends_its_request_alone_and_spoils_no_other(folder, speculative):
    llm = LLM(folder, speculative=speculative)
    tokenizer = llm.tokenizer
    letters = {tokenizer.encode(letter)[0]: 100.0 for letter in "ab"}
    large = SamplingParams(max_tokens=2000, seed=1, structure=LARGE, logit_bias=letters)
    small = SamplingParams(max_tokens=60, seed=1, structure=SMALL)
    failed, fine = llm.generate(["x", "x"], [large, small])
    assert failed.finish_reason == "error" and "structure cannot be followed further" in failed.error
    assert "too many expressions" in failed.error and len(failed.token_ids) > 10
    assert fine.finish_reason in ("stop", "length") and fine.text and not fine.error
    again = llm.generate(["x"], large)[0]
    shorter = min(len(again.token_ids), len(failed.token_ids))  # rejected drafts count towards the limit
    assert shorter > 10 and again.token_ids[:shorter] == failed.token_ids[:shorter]
    assert again.error == failed.error


def test_eval_checks_its_lengths_before_it_loads_anything(folder, capsys, monkeypatch):
    monkeypatch.setattr("openmimo.evals.runner.LLM", None)
    monkeypatch.setattr(sys, "argv", ["openmimo", "eval", str(folder), "--lengths", "64", "5000"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 1 and "--lengths 64" in err and "4096 positions" in err


@pytest.mark.parametrize("option", ["--logprobs", "--top-logprobs 3", "--prompt-logprobs", "--routed-experts"])
def test_results_that_a_terminal_does_not_show_are_no_options(option, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["openmimo", "generate", "nowhere", "--prompt", "hi", *option.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and option.split()[0] in capsys.readouterr().err


def test_the_server_answers_400_for_a_structure_and_goes_on(folder):
    tokenizer = Tokenizer.load(folder)
    letters = {str(tokenizer.encode(letter)[0]): 100.0 for letter in "ab"}
    engine = Engine(load_model(folder), tokenizer)

    def ask(client, **fields):
        return client.post("/v1/completions", json={"prompt": "x", "max_tokens": 900, **fields}, timeout=120)

    with (
        running(EngineBackend(engine, tokenizer, model_name="tiny")) as server,
        connect(server) as client,
    ):
        for form in ({"json": {"$ref": "#"}}, {"regex": r"[^\s\S]"}, {"regex": "a{20000000}"}):
            assert ask(client, structured_outputs=form).status_code == 400
        reply = ask(client, structured_outputs={"regex": LARGE.source}, logit_bias=letters, seed=1)
        assert reply.status_code == 400 and "structure cannot be followed" in reply.json()["error"]["message"]
        fine = ask(client, structured_outputs={"regex": "(yes|no)"})
        assert fine.json()["choices"][0]["text"] in ("yes", "no")
