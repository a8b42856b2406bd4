"""llama.cpp behind the wire of `serving`: its own server loop, in this process, through the `xllamacpp` package.

Steps are timed between the tokens that one streaming request receives while the other slots decode beside it. Between
two calls the slots keep their caches, so that a later call reads no prompt again.
"""

import threading
import time
from importlib.metadata import version
from pathlib import Path

import xllamacpp
from gguf_checkpoint import write_gguf
from serving import cost_of, serve

_ROOM_TOKENS = 1024  # beside the longest prompt: new tokens, and the prompt of `first_token`
_LAG_STEPS = 6  # the other requests are sent first, and outlast the measured one
_STEPS_UNDER_LOAD = 24


class LlamaCpp:
    """bfloat16 weights, float16 cache, flash attention as it chooses; one slot a sequence, none shared."""

    def load(self, folder: str, threads: int, max_sequences: int, max_length: int) -> dict[str, str]:
        """Converts the checkpoint beside its folder, unless that was done."""
        self._path = Path(folder).with_suffix(".gguf")
        if not self._path.exists() or self._path.stat().st_mtime < (Path(folder) / "config.json").stat().st_mtime:
            write_gguf(Path(folder), self._path)
        self._threads, self._max_length = threads, max_length
        self._server, self._shape = None, None
        return {
            "versions": f"xllamacpp {version('xllamacpp')}",
            "notes": xllamacpp.get_system_info().strip(" |"),
        }

    def greedy(self, prompt: list[int], count: int) -> dict[str, list]:
        """Tokens after a prompt, and their log-probabilities."""
        self._serve(1, self._max_length)
        reply = self._complete(prompt, count, slot=0, logprobs=True)
        chosen = reply["choices"][0]["logprobs"]["content"]
        return {"tokens": [entry["id"] for entry in chosen], "logprobs": [entry["logprob"] for entry in chosen]}

    def start(self, prompts: list[list[int]]) -> None:
        """A slot for each, and one more."""
        self._prompts = prompts
        self._serve(len(prompts) + 1, max(map(len, prompts)) + _ROOM_TOKENS)
        self._beside(list(enumerate(prompts)), 1)()

    def steps(self, count: int) -> list[dict[str, float]]:
        """Every step chooses a token for each slot."""
        watch = _Watch()
        wait = self._beside(list(enumerate(self._prompts))[1:], count + _LAG_STEPS)
        self._complete(self._prompts[0], count + 1, slot=0, on_piece=watch)
        wait()
        return watch.steps()

    def stop(self) -> None:
        """Ends the server with its slots."""
        self._server, self._shape = None, None

    def prefill(self, prompt: list[int]) -> dict[str, float]:
        """In a server with one slot, which is told to forget."""
        self._serve(1, self._max_length)
        return cost_of(lambda: self._complete(prompt, 1, slot=0, reuse=False))

    def first_token(self, prompt: list[int]) -> dict[str, float]:
        """Beside `longest_step_ms`: how long the others waited for a token, at most."""
        watch = _Watch()
        wait = self._beside(list(enumerate(self._prompts)), _STEPS_UNDER_LOAD, on_first_piece=watch)
        while len(watch.times) < 3:
            time.sleep(0.001)
        cost = cost_of(lambda: self._complete(prompt, 1, slot=len(self._prompts), reuse=False))
        wait()
        return cost | {"longest_step_ms": max(step["wall_ms"] for step in watch.steps())}

    def _serve(self, slots: int, length: int) -> None:
        if self._shape == (slots, length):
            return
        self._server = None  # the old one first: two would hold two caches
        params = xllamacpp.CommonParams()
        params.model.path = str(self._path)
        params.n_parallel, params.n_ctx, params.kv_unified = slots, slots * length, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.cache_ram_mib = 0
        params.fit_params = params.warmup = False
        self._server, self._shape = xllamacpp.Server(params), (slots, length)

    def _beside(self, prompts: list[tuple[int, list[int]]], count: int, on_first_piece=None):
        """Starts requests in threads of their own; the result waits for them."""
        watches = [on_first_piece] + [None] * len(prompts)
        threads = [
            threading.Thread(target=self._complete, args=(prompt, count), kwargs={"slot": slot, "on_piece": watch})
            for (slot, prompt), watch in zip(prompts, watches, strict=False)
        ]
        for thread in threads:
            thread.start()
        return lambda: [thread.join() for thread in threads]

    def _complete(
        self, prompt: list[int], count: int, *, slot: int, reuse: bool = True, logprobs: bool = False, on_piece=None
    ) -> dict | None:
        request = {
            "prompt": prompt, "n_predict": count, "id_slot": slot, "cache_prompt": reuse, "temperature": 0,
            "samplers": ["top_k"], "top_k": 1,
        }  # fmt: skip
        if logprobs:
            request["n_probs"] = 1
        if on_piece is None:
            return self._server.handle_completions(request)
        return self._server.handle_completions(request | {"stream": True}, on_piece)


class _Watch:
    """Notes when each token of a streaming request came."""

    def __init__(self):
        self.times: list[tuple[float, float]] = []

    def __call__(self, piece: dict) -> None:
        if piece["choices"][0]["text"]:
            self.times.append((time.perf_counter(), time.process_time()))

    def steps(self) -> list[dict[str, float]]:
        """The time between tokens: on the clock, and of CPU in all threads."""
        return [
            {"wall_ms": 1e3 * (wall - wall_before), "cpu_ms": 1e3 * (cpu - cpu_before)}
            for (wall_before, cpu_before), (wall, cpu) in zip(self.times, self.times[1:], strict=False)
        ]


if __name__ == "__main__":
    serve(LlamaCpp())
