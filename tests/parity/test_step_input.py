"""A step consists of tensors: from a byte copy, a worker with the same pages and states computes the same results."""

import pickle

import numpy as np
import pytest
import torch
from conftest import tiny_model

from openmimo.core.records import Request, SamplingParams
from openmimo.engine import step as step_module
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.worker import Worker


def _tensors(output):
    fields = output._asdict()
    scores = [value for scores in fields.pop("prompt_scores") for value in scores]
    return [value for value in (*scores, *fields.values()) if value is not None]


def test_a_second_worker_gives_the_same_results_from_copied_steps(monkeypatch):
    """The second worker sees only copies of the steps: decoding, verification, drafting, chunked prompts, greedy and
    sampled.
    """
    model = tiny_model(1, mtp_heads=3)
    config = EngineConfig(cache_gigabytes=0.01, prefill_tokens=16, adaptive_drafts=False)
    engine, other = Engine(model, config=config), Engine(model, config=config)
    first, second = engine._runner.worker, other._runner.worker
    num_compared = {"execute": 0, "draft": 0}

    def mirrored(real):
        def call(worker, *arguments):
            if worker is not first:
                return real(worker, *arguments)
            copies = pickle.loads(pickle.dumps(arguments))
            other.arena.num_seats = engine.arena.num_seats
            found, expected = real(second, *copies), real(first, *arguments)
            pairs = zip(_tensors(found), _tensors(expected), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            (step,) = arguments
            num_compared["execute"] += 1
            num_compared["draft"] += step.drafting is not None
            return expected

        return call

    monkeypatch.setattr(Worker, "execute", mirrored(Worker.execute))
    kinds = [
        {"temperature": 0.0, "logprobs": True},
        {"temperature": 1.0, "top_p": 0.9, "top_logprobs": 2},
        {"temperature": 0.7, "frequency_penalty": 0.5, "logit_bias": {3: 1.0}, "routed_experts": True},
        {
            "temperature": 0.0,
            "repetition_penalty": 1.3,
            "min_tokens": 9,
            "prompt_logprobs": True,
            "prompt_top_logprobs": 2,
        },
    ]
    for number, kind in enumerate(kinds):
        prompt = tuple(range(5 + number, 45 + 7 * number))
        engine.submit(Request(str(number), prompt, SamplingParams(max_tokens=12, seed=number, ignore_eos=True, **kind)))
    while engine.has_work:
        engine.step()
    assert num_compared["execute"] > 12 and num_compared["draft"] > 10


@pytest.mark.parametrize("speculative", [False, True])
def test_passes_of_a_step_reuse_the_same_memory(speculative):
    """Fixed addresses let a captured graph read its inputs. Decoding and prompts have memory of their own."""
    engine = Engine(tiny_model(1, mtp_heads=3), config=EngineConfig(speculative=speculative, adaptive_drafts=False))
    addresses, real = set(), engine._runner.worker.execute

    def execute(step):
        groups = [slots for slots in step.main.groups if slots is not None]
        tensors = [step.main.token_ids_T, step.main.positions_T, step.main.query_lengths_B, step.main.key_lengths_B]
        tensors += [tensor for slots in groups for tensor in (*slots.tables_BY, *slots.page_T, slots.offset_T)]
        addresses.add((max(step.main.lengths) > 4, *(tensor.data_ptr() for tensor in tensors)))
        return real(step)

    engine._runner.worker.execute = execute
    for number in range(3):
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        engine.submit(Request(str(number), tuple(range(10 + 30 * number)), params))
    while engine.has_work:
        engine.step()
    assert len(addresses) == 2 and len({is_prompt for is_prompt, *_ in addresses}) == 2


def test_arrays_go_to_an_accelerator_in_one_copy_and_to_the_same_place(monkeypatch):
    """The host fills one of two blocks, and waits for a block before it fills it again."""
    sent = []

    class Block:
        def __init__(self, num_bytes):
            self.array = np.zeros(num_bytes, dtype=np.uint8)

        def send(self, target, num_bytes):
            target[:num_bytes] = torch.from_numpy(self.array[:num_bytes])
            sent.append(self)

        def wait(self):
            assert len(sent) < 2 or sent[-1] is not self

    monkeypatch.setattr(step_module, "HostBlock", Block)
    staging, places = step_module._Staging(4096, torch.device("cpu")), []
    for turn in range(5):
        arrays = [
            (np.arange(turn, turn + 7), torch.int64),
            (np.full((3, 9), turn, dtype=np.int32)[:, :5], torch.int32),
            (np.zeros((2, 0), dtype=np.int32), torch.int32),
            (np.array([turn / 2]), torch.float64),
        ]
        views = [staging.add(array, dtype) for array, dtype in arrays]
        staging.send()
        assert all((view.numpy() == array).all() for view, (array, _) in zip(views, arrays, strict=True))
        places.append([view.data_ptr() for view in views])
    assert all(place == places[0] for place in places)
    assert len(sent) == 5 and sent[0] is sent[2] is not sent[1]
    with pytest.raises(AssertionError, match="exceed"):
        staging.add(np.zeros(600), torch.float64)


def test_a_decoding_step_is_one_call_and_writes_parameters_once(monkeypatch):
    """Drafts, penalties and sampling included. The host reads drafts for a grammar only."""
    engine = Engine(tiny_model(1, mtp_heads=3), config=EngineConfig(adaptive_drafts=False))
    steps, real = [], engine._runner.worker.execute
    engine._runner.worker.execute = lambda step: steps.append(step) or real(step)
    monkeypatch.setattr(Worker, "draft", lambda *arguments: pytest.fail("drafts were read"))
    kinds = [{"temperature": 0.8, "top_p": 0.9}, {"temperature": 0.0, "frequency_penalty": 0.5}, {"min_tokens": 4}]
    for number, kind in enumerate(kinds):
        params = SamplingParams(max_tokens=20, seed=number, ignore_eos=True, **kind)
        engine.submit(Request(str(number), tuple(range(10 + number)), params))
    engine.step()
    num_prefills, num_engine_steps = len(steps), 0
    while engine.has_work:
        engine.step()
        num_engine_steps += 1
    decodes = steps[num_prefills:]
    assert (
        len(decodes) == num_engine_steps and sum(step.drafting is not None for step in decodes) >= num_engine_steps - 2
    )
    assert [admitted.seat for step in steps for admitted in step.sampling.admitted] == [0, 1, 2]
    counted = [tokens for step in steps for _, tokens in step.sampling.new_tokens]
    assert 19 <= sum(map(len, counted)) <= 20
