"""The side of llama.cpp (see `serving`): its server loop runs in this process through the package `xllamacpp`.

Step times are the times between tokens of one streamed request while the other slots decode. Slots keep their caches
between calls, so later calls do not read prompts again.
"""

import threading
import time
from importlib.metadata import version
from pathlib import Path

import xllamacpp
from gguf_checkpoint import write_gguf
from serving import cost_of, serve

_ROOM_TOKENS = 1024  # in addition to the longest prompt: new tokens, and the prompt of `first_token`
_LAG_STEPS = 6  # the other requests start earlier and end later than the measured one
_STEPS_UNDER_LOAD = 24


class LlamaCpp:
    """bfloat16 weights, float16 cache, automatic flash attention, one slot per sequence."""

    def load(self, folder: str, threads: int, max_sequences: int, max_length: int) -> dict[str, str]:
        """Converts the checkpoint to a file next to its folder, unless this file is current."""
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
        """Decodes greedily. Returns tokens and log-probabilities."""
        self._serve(1, self._max_length)
        reply = self._complete(prompt, count, slot=0, logprobs=True)
        chosen = reply["choices"][0]["logprobs"]["content"]
        return {"tokens": [entry["id"] for entry in chosen], "logprobs": [entry["logprob"] for entry in chosen]}

    def start(self, prompts: list[list[int]]) -> None:
        """Starts a server with a slot per prompt and one more."""
        self._prompts = prompts
        self._serve(len(prompts) + 1, max(map(len, prompts)) + _ROOM_TOKENS)
        self._beside(list(enumerate(prompts)), 1)()

    def steps(self, count: int) -> list[dict[str, float]]:
        """Measures steps, each of which samples a token for every slot."""
        watch = _Watch()
        wait = self._beside(list(enumerate(self._prompts))[1:], count + _LAG_STEPS)
        self._complete(self._prompts[0], count + 1, slot=0, on_piece=watch)
        wait()
        return watch.steps()

    def stop(self) -> None:
        """Stops the server."""
        self._server, self._shape = None, None

    def prefill(self, prompt: list[int]) -> dict[str, float]:
        """Measures reading a prompt in a server with one slot, without prompt reuse."""
        self._serve(1, self._max_length)
        return cost_of(lambda: self._complete(prompt, 1, slot=0, reuse=False))

    def first_token(self, prompt: list[int]) -> dict[str, float]:
        """Returns the cost and `longest_step_ms`, the longest wait of the decoding sequences for a token."""
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
        self._server = None  # free the old cache before the new server allocates one
        params = xllamacpp.CommonParams()
        params.model.path = str(self._path)
        params.n_parallel, params.n_ctx, params.kv_unified = slots, slots * length, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.cache_ram_mib = 0
        params.fit_params = params.warmup = False
        self._server, self._shape = xllamacpp.Server(params), (slots, length)

    def _beside(self, prompts: list[tuple[int, list[int]]], count: int, on_first_piece=None):
        """Starts requests in threads. Returns a function that waits for them."""
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
    """Records the arrival time of each token of a streamed request."""

    def __init__(self):
        self.times: list[tuple[float, float]] = []

    def __call__(self, piece: dict) -> None:
        if piece["choices"][0]["text"]:
            self.times.append((time.perf_counter(), time.process_time()))

    def steps(self) -> list[dict[str, float]]:
        """Returns wall time and CPU time of all threads between tokens."""
        return [
            {"wall_ms": 1e3 * (wall - wall_before), "cpu_ms": 1e3 * (cpu - cpu_before)}
            for (wall_before, cpu_before), (wall, cpu) in zip(self.times, self.times[1:], strict=False)
        ]


if __name__ == "__main__":
    serve(LlamaCpp())
