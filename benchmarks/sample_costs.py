"""One measurement of `bench_samples`: prints the host costs of one long sample as JSON.

    python benchmarks/sample_costs.py TOKENS LAYERS

Imports the package from PYTHONPATH and nothing else of the repository, so one file can measure two checkouts.
"""

import importlib
import importlib.util
import json
import sys
import tempfile
import time
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from openmimo.core.records import Request, SamplingParams, TokenLogprob
from openmimo.core.samples import Sample
from openmimo.engine.cache import PageArena, PageTables
from openmimo.engine.prefix import PrefixCache
from openmimo.model.config import AttentionConfig, ModelConfig
from openmimo.model.presets import flash
from openmimo.rl.config import SchedulerConfig, SourceQuota

ACTIVE_EXPERTS = 8
PROMPT_TOKENS = 64


def _module(*names: str) -> object:
    """Imports the first of these modules that exists. Modules have other names in earlier versions."""
    for name in names:
        package = name.rpartition(".")[0]
        if importlib.util.find_spec(package) and importlib.util.find_spec(name):
            return importlib.import_module(name)
    raise ImportError(names)


def started_request(tokens: int, *, routed: bool) -> tuple[object, object, PrefixCache]:
    """Returns the module of request states, a request that holds all its pages, and its prefix tree."""
    module = _module("openmimo.engine.request_state", "openmimo.engine.sequence")
    state_class = getattr(module, "RequestState", None) or module.Sequence
    full = AttentionConfig(
        "full", num_heads=1, num_kv_heads=1, key_dim=8, value_dim=8, rotary_dim=8, rope_theta=10_000.0
    )
    sliding = replace(full, kind="sliding", window_keys=129)
    arena = PageArena([full, *[sliding] * 5], cache_bytes=tokens * 2048)
    params = SamplingParams(max_tokens=tokens, logprobs=True, routed_experts=routed)
    prompt = tuple(range(PROMPT_TOKENS))
    state = state_class(Request("1", prompt, params), list(prompt), 0, len(prompt) + tokens, frozenset())
    state.pages = PageTables(arena, 0)
    prefix = PrefixCache(arena)
    prefix.start(state)
    state.pages.reach(len(prompt) + tokens, spare_pages=arena.num_pages)
    return module, state, prefix


def _decision(module: object, token: int) -> object:
    """A decision with its log-probability, which was a record of its own."""
    is_number = "top" in module.Decision._fields
    return module.Decision(token, -0.5 if is_number else TokenLogprob(token, -0.5))


def _name_of_computed(state: object) -> str:
    """The name of the number of computed positions, which was changed."""
    names = {field.name for field in fields(state)}
    return next(name for name in ("num_computed_tokens", "computed") if name in names)


def engine_seconds(tokens: int, routes: np.ndarray) -> tuple[float, object]:
    """Confirms the tokens of a request and adds them to the prefix tree. Returns the CPU time and the completion."""
    module, state, prefix = started_request(tokens, routed=True)
    ids = np.random.default_rng(0).integers(0, 150_000, tokens).tolist()
    decisions = [_decision(module, token) for token in ids]
    computed = _name_of_computed(state)
    state.routing.append(routes[: PROMPT_TOKENS - 1])  # those of the computed positions
    start = time.thread_time()
    for index, decision in enumerate(decisions):
        state.add(decision, drafted=False, policy_version=3)
        state.routing.append(routes[index : index + 1])
        setattr(state, computed, len(state.tokens) - 1)
        prefix.extend(state)
    return time.thread_time() - start, state.completion()


def engine_bytes(tokens: int) -> int:
    """Returns the bytes of a request and its part of the prefix tree, without routes."""
    module, state, prefix = started_request(tokens, routed=False)
    ids, computed = np.random.default_rng(0).integers(0, 150_000, tokens), _name_of_computed(state)
    tracemalloc.start()
    for token in ids:
        state.add(_decision(module, int(token)), drafted=False, policy_version=3)
        setattr(state, computed, len(state.tokens) - 1)
        prefix.extend(state)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held


def sample_of(completion: object) -> Sample:
    """Converts a completion to a sample with the code of the rollouts."""
    module = _module("openmimo.rl.rollouts.episode_steps", "openmimo.rl.rollouts.engine", "openmimo.rl.rollout")
    extend = vars(module).get("with_completion") or module._extended
    length = len(completion.prompt_token_ids)
    first = Sample(list(completion.prompt_token_ids), [False] * length, [0.0] * length, [-1] * length)
    return extend(first, completion)


def pack(samples: list[Sample], layers: int) -> None:
    """Builds all inputs of the trainer for a micro-batch."""
    trainer = _module("openmimo.rl.learning.policy_trainer", "openmimo.rl.policy_trainer")
    packer = _module("openmimo.rl.learning.packing", trainer.__name__)
    config: ModelConfig = flash()
    model = SimpleNamespace(routers=lambda: dict.fromkeys(range(1, layers + 1)), config=config, device="cpu")
    packed = packer.pack_samples(samples, device=torch.device("cpu"))
    packed.routes(model)
    packed.written(lambda sample: sample.logprobs)
    packed.written(lambda sample: sample.versions, torch.int64)


def open_log(folder: Path) -> object:
    """Returns a logged scheduler with one source."""
    events = _module("openmimo.rl.scheduling.event_log", "openmimo.rl.event_log")
    scheduler = _module("openmimo.rl.scheduling.scheduler", "openmimo.rl.scheduler")
    problems = _module("openmimo.rl.scheduling.problems", "openmimo.rl.problems")
    config = SchedulerConfig((SourceQuota("math", samples_per_prompt=2),), groups_per_step=2, dynamic_sampling=False)
    streams = {"math": lambda index: problems.Problem(f"p{index}", index)}
    return events.LoggedScheduler(scheduler.DataScheduler(config, streams), folder)


def warm_up(layers: int) -> None:
    """Imports all modules and starts the threads of torch before times are measured."""
    sample = Sample(list(range(64)), [False] + [True] * 63, [0.0] * 64, [0] * 64)
    sample.routed_experts = np.zeros((63, layers, ACTIVE_EXPERTS), np.uint8)
    _module("openmimo.rl.rollouts.engine", "openmimo.rl.rollout")
    pack([sample], layers)


def main(tokens: int, layers: int) -> dict[str, float]:
    """Returns all costs of one sample: seconds by stage, bytes of the engine's state and of the log."""
    warm_up(layers)
    routes = np.random.default_rng(1).integers(0, 256, (tokens, layers, ACTIVE_EXPERTS), np.uint8)
    engine_seconds(tokens, routes)  # warm-up: the first request of a process also allocates memory
    seconds, completion = engine_seconds(tokens, routes)
    costs = {"engine_seconds": seconds, "engine_bytes": engine_bytes(tokens)}

    def timed(name: str, call: object) -> object:
        clock = time.perf_counter if name == "sync" else time.process_time
        start = clock()
        result = call()
        costs[f"{name}_seconds"] = clock() - start
        return result

    sample = timed("sample", lambda: sample_of(completion))
    with tempfile.TemporaryDirectory() as folder:
        log = open_log(Path(folder))
        log.begin_step(0)
        request = log.next_submissions(4)[0]
        sample.group, sample.reward, sample.finish_reason = request.group_id, 1.0, "stop"
        sample.info["sample_id"] = request.sample_ids[0]
        timed("log", lambda: log.on_sample(sample))
        timed("sync", log.close)
        again = open_log(Path(folder))
        timed("read", lambda: again.begin_step(0))
        groups = [vars(group) for group in again.scheduler._groups.values()]
        members = [member for group in groups for member in group.get("members") or group["slots"]]
        read = next(member.sample for member in members if member.sample)
        costs["log_bytes"] = sum(path.stat().st_size for path in Path(folder).iterdir())
        timed("pack", lambda: pack([read], layers))
    costs["routes_bytes"] = routes.nbytes
    return costs


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
