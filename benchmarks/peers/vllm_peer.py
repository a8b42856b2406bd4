"""vLLM's CPU backend behind the wire of `serving`, its engine stepped in this process.

It attends only where values are as wide as keys (`med_eq`), and reads the window and the rotated share from keys of the
hub's dialect, so it gets the same tensors beside a `config.json` of its own.
"""

import json
import os
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip

import torch  # noqa: E402
import vllm  # noqa: E402
from serving import NotSupported, cost_of, serve  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

_NEW_TOKENS = 1000  # more than any measurement takes


class VLLM:
    """`vllm.LLM` in bfloat16, compiled as it does by default, without prefix reuse."""

    def load(self, folder: str, threads: int, max_sequences: int, max_length: int) -> dict[str, str]:
        """Compiles on the first call of a machine."""
        config = json.loads((Path(folder) / "config.json").read_text())
        if config["head_dim"] != config["v_head_dim"]:
            raise NotSupported(f"keys of {config['head_dim']} dims beside values of {config['v_head_dim']} on a CPU")
        torch.set_num_threads(threads)
        self._llm = LLM(
            str(_with_own_config(Path(folder), config)), dtype="bfloat16", skip_tokenizer_init=True,
            enable_prefix_caching=False, max_num_seqs=max_sequences, max_model_len=max_length,
        )  # fmt: skip
        self._engine, self._number, self._running = self._llm.llm_engine, 0, []
        return {"versions": f"vllm {vllm.__version__}, torch {torch.__version__}", "notes": "no MTP heads"}

    def greedy(self, prompt: list[int], count: int) -> dict[str, list]:
        """Tokens after a prompt, and their log-probabilities."""
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1, detokenize=False)
        out = self._llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
        logprobs = [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs, strict=True)]
        return {"tokens": list(out.token_ids), "logprobs": logprobs}

    def start(self, prompts: list[list[int]]) -> None:
        """Steps until every sequence has its first token."""
        self._running = [self._add(prompt) for prompt in prompts]
        waiting = set(self._running)
        while waiting:
            waiting -= self._step()

    def steps(self, count: int) -> list[dict[str, float]]:
        """Whole engine steps."""
        return [cost_of(self._engine.step) for _ in range(count)]

    def stop(self) -> None:
        """Aborts them."""
        self._engine.abort_request(self._running)
        self._running = []

    def prefill(self, prompt: list[int]) -> dict[str, float]:
        """Chunked as it does by default."""
        return cost_of(lambda: self._read(prompt, []))

    def first_token(self, prompt: list[int]) -> dict[str, float]:
        """Beside `longest_step_ms`: how long the others waited for a token, at most."""
        steps = []
        cost = cost_of(lambda: self._read(prompt, steps))
        return cost | {"longest_step_ms": max(step["wall_ms"] for step in steps)}

    def _read(self, prompt: list[int], steps: list[dict[str, float]]) -> None:
        number, came = self._add(prompt), set()
        while number not in came:
            steps.append(cost_of(lambda: came.update(self._step())))
        self._engine.abort_request([number])

    def _add(self, prompt: list[int]) -> str:
        self._number += 1
        params = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._number), {"prompt_token_ids": prompt}, params)
        return str(self._number)

    def _step(self) -> set[str]:
        return {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}


def _with_own_config(folder: Path, config: dict) -> Path:
    """A folder with links to the tensors and the keys that vLLM asks for."""
    own = folder.with_name(folder.name + "_vllm")
    own.mkdir(exist_ok=True)
    for file in folder.glob("*.safetensors*"):
        if not (own / file.name).exists():
            (own / file.name).symlink_to(file.resolve())
    keys = {
        "sliding_window_size": config["sliding_window"],
        "partial_rotary_factor": config["rope_parameters"]["full_attention"]["partial_rotary_factor"],
    }
    (own / "config.json").write_text(json.dumps(config | keys, indent=2))
    return own


if __name__ == "__main__":
    serve(VLLM())
