"""The side of openmimo (see `serving`), with two more features: the size of its cache, and steps with drafts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script does not have the repository on its path

import torch
from serving import cost_of, serve

import openmimo
from openmimo.core.records import Request, SamplingParams
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.request_state import RequestState
from openmimo.model.hf import load_model

_FOREVER = 1 << 20  # new tokens; no request ends during a measurement


class OpenMiMo:
    """Decoding without prefix reuse, plain or with all MTP heads."""

    def load(self, folder: str, threads: int, max_sequences: int, max_length: int) -> dict[str, str]:
        """Loads the model in bfloat16, with float32 routers."""
        torch.set_num_threads(threads)
        self._model = load_model(folder, dtype="bfloat16")
        self._max_sequences, self._number = max_sequences, 0
        self._new_engine(speculative=False)
        return {"versions": f"openmimo {openmimo.__version__}, torch {torch.__version__}", "notes": ""}

    def greedy(self, prompt: list[int], count: int) -> dict[str, list]:
        """Decodes greedily. Returns tokens and log-probabilities."""
        sequence = self._submit(prompt, max_tokens=count, logprobs=True)
        while not sequence.finish_reason:
            self._engine.step()
        completion = sequence.completion()
        return {"tokens": completion.token_ids, "logprobs": completion.logprobs}

    def start(self, prompts: list[list[int]], drafts: bool = False) -> None:
        """Reads the prompts. With `drafts`, all MTP heads draft in every step."""
        self._new_engine(speculative=drafts)
        self._running = [self._submit(prompt) for prompt in prompts]
        while any(sequence.num_uncomputed_tokens > 1 for sequence in self._running):
            self._engine.step()

    def steps(self, count: int) -> list[dict[str, float]]:
        """Measures steps. With drafts, a step verifies three drafts per sequence and runs the heads."""
        return [cost_of(self._engine.step) for _ in range(count)]

    def stop(self) -> None:
        """Aborts the running sequences."""
        for sequence in self._running:
            self._engine.abort(sequence.request.id)
        self._running = []

    def prefill(self, prompt: list[int]) -> dict[str, float]:
        """Measures reading a prompt in an idle engine."""
        return cost_of(lambda: self._read(prompt))

    def first_token(self, prompt: list[int]) -> dict[str, float]:
        """Returns the cost and `longest_step_ms`, the longest wait of the decoding sequences for a token."""
        steps = []
        cost = cost_of(lambda: self._read(prompt, steps))
        return cost | {"longest_step_ms": max(step["wall_ms"] for step in steps)}

    def cache(self) -> dict[str, int]:
        """Returns bytes of the pages of running sequences, of the ideal cache, and of a cache with all layers full."""
        arena = self._engine.arena
        return {
            "page_bytes": arena.page_bytes * sum(sequence.pages.num_pages for sequence in self._running),
            "ideal_bytes": sum(arena.ideal_bytes(sequence.num_computed_tokens) for sequence in self._running),
            "all_global_bytes": sum(arena.all_global_bytes(sequence.num_computed_tokens) for sequence in self._running),
        }

    def _new_engine(self, *, speculative: bool) -> None:
        config = EngineConfig(
            max_sequences=self._max_sequences, cache_gigabytes=2.0, prefix_cache=False, speculative=speculative,
            adaptive_drafts=False,
        )  # fmt: skip
        self._engine = Engine(self._model, config=config)
        self._running: list[RequestState] = []

    def _read(self, prompt: list[int], steps: list[dict[str, float]] | None = None) -> None:
        sequence = self._submit(prompt)
        while len(sequence.tokens) == len(prompt):
            cost = cost_of(self._engine.step)
            if steps is not None:
                steps.append(cost)
        self._engine.abort(sequence.request.id)

    def _submit(self, prompt: list[int], *, max_tokens: int = _FOREVER, logprobs: bool = False) -> RequestState:
        self._number += 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=logprobs)
        return self._engine.submit(Request(str(self._number), tuple(prompt), params))


if __name__ == "__main__":
    with torch.inference_mode():
        serve(OpenMiMo())
