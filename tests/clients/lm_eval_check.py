"""lm-eval against the server and with the package's own model; compared with lm-eval's hf model.

Likelihood, multiple choice, rolling, generation and chat.
"""

import functools
import json
import os
import sys
from pathlib import Path

from checks import MODEL, Served, check, main

sys.path.append(os.environ["OPENMIMO_ROOT"])  # model openmimo runs in this process
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager, get_task_dict

ROWS = [
    {"text": "The quick brown fox jumps over the lazy dog.", "choices": [" 01", " fox", " jumps"], "label": 1},
    {"text": "def add(a, b):\n    return a + b\n", "choices": ["def", "return a", "é, 日本"], "label": 0},
    {"text": "Größe: 日本語 and émigré", "choices": ["ß", "日", " x"], "label": 2},
]
COMMON = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}"}
TASKS = {
    "likelihood": {"output_type": "loglikelihood", "doc_to_target": "{{choices[label]}}", "metric_list": [
        {"metric": "perplexity"}, {"metric": "acc"}]},
    "choice": {"output_type": "multiple_choice", "doc_to_target": "label", "doc_to_choice": "choices", "metric_list": [
        {"metric": "acc"}, {"metric": "acc_norm"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [
        {"metric": "word_perplexity"}]},
    "generate": {"output_type": "generate_until", "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@functools.cache
def responses(model: str, url: str, folder: str, **options: str) -> dict[str, list]:
    """The model's raw responses to every task, in the order of the documents."""
    path = Path(folder) / "lm_eval_rows.json"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    arguments = {"pretrained": folder, "dtype": "float32", "max_length": 1024, "device": "cpu"}
    if model == "openmimo":
        from openmimo.evals import harness

        assert harness.OpenMiMo is get_model("openmimo")
    elif model != "hf":
        arguments = {"model": MODEL, "base_url": url, "max_length": 1024, "num_concurrent": 2, **options}
    configs = {
        f"own_{name}": {**COMMON, **task, "task": f"own_{name}", "dataset_kwargs": {"data_files": {"test": str(path)}}}
        for name, task in TASKS.items()
        if model != "local-chat-completions" or name == "generate"
    }
    lm = get_model(model).create_from_arg_obj(arguments)
    tasks = get_task_dict(list(configs.values()), TaskManager(include_defaults=False))
    is_chat = model == "local-chat-completions" or "chat" in options
    result = evaluate(lm=lm, task_dict=tasks, log_samples=True, bootstrap_iters=0, apply_chat_template=is_chat)
    return {
        name: [one["filtered_resps"] for one in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in result["samples"].items()
    }


def near(ours: list, theirs: list) -> None:
    """Likelihoods agree to rounding, greedy flags and texts exactly."""
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, list | tuple):
            near(mine, other)
        elif isinstance(mine, float):
            assert abs(mine - other) < 1e-3, (ours, theirs)
        else:
            assert mine == other, (ours, theirs)


for name in TASKS:

    @check(f"lm-eval {name} equals its hf model")
    def _(served: Served, task: str = f"own_{name}") -> None:
        ours = responses("local-completions", f"{served.url}/v1/completions", served.folder, tokenizer=served.folder)
        near(ours[task], responses("hf", "", served.folder)[task])

    @check(f"lm-eval {name} through model openmimo equals its hf model")
    def _(served: Served, task: str = f"own_{name}") -> None:
        near(responses("openmimo", "", served.folder)[task], responses("hf", "", served.folder)[task])


@check("lm-eval with the server's tokenizer")
def _(served: Served) -> None:
    address, folder = f"{served.url}/v1/completions", served.folder
    ours = responses("local-completions", address, folder, tokenizer_backend="remote")
    for task, expected in responses("local-completions", address, folder, tokenizer=folder).items():
        near(ours[task], expected)


@check("lm-eval chat")
def _(served: Served) -> None:
    address = f"{served.url}/v1/chat/completions"
    texts = responses("local-chat-completions", address, served.folder)["own_generate"]
    assert len(texts) == len(ROWS) and all(isinstance(text, str) for (text,) in texts), texts


@check("lm-eval chat through model openmimo")
def _(served: Served) -> None:
    address = f"{served.url}/v1/chat/completions"
    theirs = responses("local-chat-completions", address, served.folder)["own_generate"]
    near(responses("openmimo", "", served.folder, chat="yes")["own_generate"], theirs)


main("lm_eval")
