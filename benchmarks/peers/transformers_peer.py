"""The side of transformers (see `serving`): its own model class and cache, batches of prompts of equal length.

Long prompts are read in pieces through the cache. Only eager attention supports sinks, and its scores of 16,384 tokens
would take gigabytes per layer. Pieces are also faster.
"""

import torch
import transformers
from serving import NotSupported, cost_of, serve
from transformers import AutoModelForCausalLM

_PIECE_TOKENS = 512


class Transformers:
    """The model class that `AutoModelForCausalLM` selects."""

    def load(
        self, folder: str, threads: int, max_sequences: int, max_length: int, dtype: str = "bfloat16"
    ) -> dict[str, str]:
        """Loads the model. `max_sequences` and `max_length` have no effect."""
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return {
            "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "notes": f"eager attention, {self._model.config._experts_implementation} experts, no MTP heads",
        }

    def greedy(self, prompt: list[int], count: int) -> dict[str, list]:
        """Decodes greedily. Returns tokens and log-probabilities."""
        tokens, logprobs = [], []
        cache, logits_BV = self._read([prompt])
        for _ in range(count):
            chosen = logits_BV.float().log_softmax(-1).max(-1)
            tokens.append(chosen.indices.item())
            logprobs.append(chosen.values.item())
            logits_BV = self._step(cache, chosen.indices)
        return {"tokens": tokens, "logprobs": logprobs}

    def start(self, prompts: list[list[int]]) -> None:
        """Reads the prompts. They must have equal length, because there is no padding."""
        self._cache, logits_BV = self._read(prompts)
        self._tokens_B = logits_BV.argmax(-1)

    def steps(self, count: int) -> list[dict[str, float]]:
        """Measures greedy steps, including the selection of tokens."""
        return [cost_of(self._next) for _ in range(count)]

    def stop(self) -> None:
        """Frees the cache."""
        self._cache = None

    def prefill(self, prompt: list[int]) -> dict[str, float]:
        """Measures reading a prompt, with logits of only the last token."""
        return cost_of(lambda: self._read([prompt])[1].argmax(-1).tolist())

    def first_token(self, prompt: list[int]) -> dict[str, float]:
        """Not supported: its continuous batching requires values as wide as keys."""
        raise NotSupported("continuous batching (generate_batch) fails on this model")

    def _next(self) -> None:
        self._tokens_B = self._step(self._cache, self._tokens_B).argmax(-1)
        self._tokens_B.tolist()

    def _read(self, prompts: list[list[int]]) -> tuple[object, torch.Tensor]:
        """Returns the cache and the logits [B, V] after the last token."""
        cache = None
        for piece_BT in torch.tensor(prompts).split(_PIECE_TOKENS, dim=1):
            out = self._model(piece_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
        return cache, out.logits[:, -1]

    def _step(self, cache: object, tokens_B: torch.Tensor) -> torch.Tensor:
        return self._model(tokens_B[:, None], past_key_values=cache, use_cache=True).logits[:, -1]


if __name__ == "__main__":
    with torch.inference_mode():
        serve(Transformers())
