"""Our checkpoints as a model of lm-eval (the package `lm_eval`, which the user installs).

    python -m openmimo.evals.harness run --model openmimo --model_args pretrained=PATH --tasks hellaswag

The module registers the model `openmimo` and passes the command line to lm-eval. From Python, import the module and
call `lm_eval.simple_evaluate(model="openmimo", model_args={"pretrained": PATH})`. Scores equal those of lm-eval's `hf`
model on the same folder.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from openmimo.core.errors import ConfigError, UserError
from openmimo.core.records import Completion, SamplingParams
from openmimo.data.chat.template import render
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.llm import LLM

_DEFAULT_NEW_TOKENS = 256
_AUTO_BATCH_SIZE = 16
Scored = tuple[float, bool]


@register_model("openmimo")
class OpenMiMo(TemplateLM):
    """A checkpoint behind lm-eval's model interface.

    Args:
        pretrained: A checkpoint folder with a tokenizer.
        dtype: Of weights and activations.
        device: auto, cpu, or a device of torch.
        batch_size: Prompts that the engine gets at once ("auto": 16).
        max_length: Longest prompt (None: the model's positions). Longer prompts lose their beginning.
        max_batch_size: Not used; lm-eval passes it to every model.

    Raises:
        UserError: The folder or an argument is wrong.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        device: str | None = "auto",
        batch_size: int | str | None = 16,
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.tokenizer = Tokenizer.load(pretrained)
        self._path = pretrained
        self._llm = LLM(pretrained, self.tokenizer, dtype=dtype, device=device or "auto")
        text = str(batch_size)
        self._batch_size = max(int(text), 1) if text.isdigit() else _AUTO_BATCH_SIZE
        positions = self._llm.model.config.max_positions
        self.max_length = min(max_length or positions, positions)
        self._allows_special = False

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text; lm-eval puts it before a text without a context."""
        return self.tokenizer.eos_token_ids[0]

    @property
    def tokenizer_name(self) -> str:
        """The folder, for lm-eval's cache of requests."""
        return self._path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for lm-eval's log."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. From now on, texts may contain special tokens."""
        self._allows_special = True
        return render(
            chat_history,
            template=self.tokenizer.chat_template,
            add_generation_prompt=add_generation_prompt,
            special_tokens={"eos_token": self.tokenizer.eos_token},
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """The token ids of a text. The tokenizers of this package add no special tokens."""
        return self.tokenizer.encode(string, allow_special=self._allows_special)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[Scored]:
        """Log-likelihood and whether it is the greedy answer, for pairs of context and continuation."""
        results: list[Scored] = []
        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=True, prompt_top_logprobs=1, seed=0)
        for start in range(0, len(requests), self._batch_size):
            batch = requests[start : start + self._batch_size]
            prompts = [(context + answer)[-(self.max_length - 1) :] for _, context, answer in batch]
            answers = self._completed(prompts, [params] * len(prompts))
            for (key, _, answer), prompt, completion in zip(batch, prompts, answers, strict=True):
                results.append(_score(prompt, len(answer), completion))
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the model's length, as lm-eval divides them."""
        results = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            results.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuations of texts up to their stop strings. A long text loses its beginning."""
        results: list[str] = []
        for start in range(0, len(requests), self._batch_size):
            batch = requests[start : start + self._batch_size]
            params = [_sampling(settings) for _, settings in (request.args for request in batch)]
            prompts = []
            for request, one in zip(batch, params, strict=True):
                room = max(self.max_length - one.max_tokens, 1)
                prompts.append(self.tok_encode(request.args[0])[-room:])
            for request, completion in zip(batch, self._completed(prompts, params), strict=True):
                results.append(completion.text)
                self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return results

    def _completed(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Completion]:
        completions = self._llm.generate(prompts, params)
        for completion in completions:
            if completion.error:
                raise UserError(f"{self._path}: {completion.error}.")
        return completions


def _score(prompt: list[int], num_scored: int, completion: Completion) -> Scored:
    """Sum and greedy flag of the last `num_scored` tokens of a prompt. Entry i of the scores belongs to token i + 1."""
    assert completion.prompt_logprobs is not None and completion.prompt_top_logprobs is not None
    num_scored = min(num_scored, len(prompt) - 1)
    if not num_scored:
        return 0.0, True
    likeliest = [top[0][0] for top in completion.prompt_top_logprobs[-num_scored:]]
    return sum(completion.prompt_logprobs[-num_scored:]), likeliest == prompt[-num_scored:]


def _sampling(settings: dict[str, Any]) -> SamplingParams:
    """Sampling parameters of lm-eval's generation settings. Raises ConfigError for a setting without a counterpart."""
    known = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "do_sample", "temperature", "top_p", "top_k"}
    if unknown := sorted(set(settings) - known):
        raise ConfigError(
            f"generation_kwargs has {', '.join(unknown)}; model openmimo knows {', '.join(sorted(known))}."
        )
    names = ("max_gen_toks", "max_new_tokens", "max_tokens")
    limits = [int(settings[name]) for name in names if settings.get(name) is not None]
    until = settings.get("until") or ()
    is_sampled = settings.get("do_sample", bool(settings.get("temperature")))
    return SamplingParams(
        max_tokens=limits[0] if limits else _DEFAULT_NEW_TOKENS,
        temperature=float(settings.get("temperature") or 1.0) if is_sampled else 0.0,
        top_p=float(settings.get("top_p") or 1.0),
        top_k=int(settings.get("top_k") or 0),
        stop=(until,) if isinstance(until, str) else tuple(one for one in until if one),
    )


if __name__ == "__main__":
    cli_evaluate()
