"""The side of vLLM's CPU backend (see `serving`), whose engine is stepped in this process.

Its attention requires values as wide as keys (`med_eq`). It reads the window and the rotary fraction from keys of the
hub's dialect, so it gets links to the same tensors and a separate `config.json`.
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

_NEW_TOKENS = 1000  # more than any measurement uses


class VLLM:
    """`vllm.LLM` in bfloat16 with default compilation, without prefix reuse."""

    def load(self, folder: str, threads: int, max_sequences: int, max_length: int) -> dict[str, str]:
        """Loads the model. vLLM compiles it on the first call on a machine."""
        config = json.loads((Path(folder) / "config.json").read_text())
        if config["head_dim"] != config["v_head_dim"]:
            raise NotSupported(f"keys of {config['head_dim']} dims with values of {config['v_head_dim']} dims on a CPU")
        torch.set_num_threads(threads)
        self._llm = LLM(
            str(_with_own_config(Path(folder), config)), dtype="bfloat16", skip_tokenizer_init=True,
            enable_prefix_caching=False, max_num_seqs=max_sequences, max_model_len=max_length,
        )  # fmt: skip
        self._engine, self._number, self._running = self._llm.llm_engine, 0, []
        return {"versions": f"vllm {vllm.__version__}, torch {torch.__version__}", "notes": "no MTP heads"}

    def greedy(self, prompt: list[int], count: int) -> dict[str, list]:
        """Decodes greedily. Returns tokens and log-probabilities."""
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1, detokenize=False)
        out = self._llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
        logprobs = [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs, strict=True)]
        return {"tokens": list(out.token_ids), "logprobs": logprobs}

    def start(self, prompts: list[list[int]]) -> None:
        """Adds the prompts and steps until every sequence has its first token."""
        self._running = [self._add(prompt) for prompt in prompts]
        waiting = set(self._running)
        while waiting:
            waiting -= self._step()

    def steps(self, count: int) -> list[dict[str, float]]:
        """Measures engine steps."""
        return [cost_of(self._engine.step) for _ in range(count)]

    def stop(self) -> None:
        """Aborts the running sequences."""
        self._engine.abort_request(self._running)
        self._running = []

    def prefill(self, prompt: list[int]) -> dict[str, float]:
        """Measures reading a prompt with default chunking."""
        return cost_of(lambda: self._read(prompt, []))

    def first_token(self, prompt: list[int]) -> dict[str, float]:
        """Returns the cost and `longest_step_ms`, the longest wait of the decoding sequences for a token."""
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
    """Creates a folder with links to the tensors and a config with the keys that vLLM requires."""
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
