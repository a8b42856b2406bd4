"""The side of TRL (see `serving`): GRPOTrainer and DistillationTrainer, one optimizer step at a time.

The settings make TRL do the same work as openmimo: no gradient checkpointing (its default), no logging, no reference
model, one micro-batch, generation by transformers with its cache.
"""

import os
import queue
import threading
import time
from collections.abc import Callable

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from digit_reward import digit_share  # noqa: E402
from serving import cost_of, serve  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer  # noqa: E402

_MAX_STEPS = 10**6


class _Pace(TrainerCallback):
    """Runs a trainer in a thread and pauses it before every optimizer step."""

    def __init__(self):
        self._may_go: queue.Queue[None] = queue.Queue()
        self._ended: queue.Queue[BaseException | None] = queue.Queue()

    def begin(self, train: Callable[[], object]) -> None:
        """Starts the trainer, which pauses before its first step."""
        threading.Thread(target=self._train, args=(train,), daemon=True).start()

    def one_step(self) -> None:
        """Runs one step. Raises the exception of the trainer, if any."""
        self._may_go.put(None)
        error = self._ended.get()
        if error is not None:
            raise error

    def on_step_begin(self, *_, **__) -> None:
        """Waits for `one_step`. TRL calls this before it generates the batch."""
        self._may_go.get()

    def on_step_end(self, *_, **__) -> None:
        """Reports the end of the step. TRL calls this after the optimizer step."""
        self._ended.put(None)

    def _train(self, train: Callable[[], object]) -> None:
        try:
            train()
        except BaseException as error:  # passed to `one_step`
            self._ended.put(error)


class Trl:
    """One trainer of TRL."""

    def load(
        self, folder: str, run_folder: str, threads: int, prompts: list[str], prompt_ids: list[list[int]],
        samples_per_prompt: int, samples: int, new_tokens: int, end_ids: list[int], learning_rate: float,
        teacher: str | None = None,
    ) -> dict[str, str]:  # fmt: skip
        """Prepares a trainer.

        Args:
            folder: The checkpoint.
            run_folder: Folder of the run.
            threads: CPU threads.
            prompts: The prompts.
            prompt_ids: Expected token ids of the prompts.
            samples_per_prompt: Answers per prompt.
            samples: Answers per step.
            new_tokens: Maximum tokens of an answer. Without `end_ids`, all answers have this length.
            end_ids: Tokens that end an answer, in addition to end-of-text.
            learning_rate: Learning rate.
            teacher: Checkpoint of the teacher for distillation (None: GRPO).

        Raises:
            ValueError: The tokenizer of transformers gives other ids than `prompt_ids`.
        """
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        if tokenizer(prompts)["input_ids"] != prompt_ids:
            raise ValueError("the tokenizers of transformers and openmimo give different ids for the prompts")
        model, self._pace = _model(folder), _Pace()
        if end_ids:
            model.generation_config.eos_token_id = end_ids
        settings = {
            "output_dir": run_folder, "per_device_train_batch_size": samples, "gradient_accumulation_steps": 1,
            "max_steps": _MAX_STEPS, "learning_rate": learning_rate, "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused", "adam_beta2": 0.95, "max_grad_norm": 1.0, "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "max_completion_length": new_tokens, "shuffle_dataset": False,
            "generation_kwargs": {} if end_ids else {"min_new_tokens": new_tokens}, "logging_strategy": "no",
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip
        common = {"model": model, "processing_class": tokenizer, "callbacks": [self._pace]}
        if teacher is None:
            dataset = Dataset.from_dict({"prompt": prompts})
            config = GRPOConfig(**settings, num_generations=samples_per_prompt, beta=0.0, epsilon_high=0.28)
            trainer = GRPOTrainer(**common, args=config, train_dataset=dataset, reward_funcs=_rewards)
        else:
            repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
            dataset = Dataset.from_dict({"prompt": repeated})
            config = DistillationConfig(**settings, beta=1.0)
            trainer = DistillationTrainer(**common, args=config, train_dataset=dataset, teacher_model=_model(teacher))
        self._end_ids = [*end_ids, tokenizer.eos_token_id]
        self._watch_generation(model)
        self._pace.begin(trainer.train)
        attention, experts = model.config._attn_implementation, getattr(model.config, "_experts_implementation", None)
        return {
            "versions": f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
            "notes": f"{attention} attention" + (f", {experts} experts" if "mimo" in model.config.model_type else ""),
        }

    def steps(self, count: int) -> list[dict[str, float]]:
        """Returns the cost of each step, with `generate_ms` and `new_tokens` of the whole batch."""
        return [cost_of(self._pace.one_step) | self._generated for _ in range(count)]

    def _watch_generation(self, model: transformers.PreTrainedModel) -> None:
        generate = model.generate

        def watched(*arguments, **settings) -> torch.Tensor:
            start = time.perf_counter()
            ids = generate(*arguments, **settings)
            width = settings["input_ids"].shape[1]
            milliseconds = 1e3 * (time.perf_counter() - start)
            self._generated = {"generate_ms": milliseconds, "new_tokens": _written(ids[:, width:], self._end_ids)}
            return ids

        model.generate = watched


def _written(answers: torch.Tensor, end_ids: list[int]) -> int:
    """Returns the number of tokens up to and including the first end of each row."""
    ends = torch.isin(answers, torch.tensor(end_ids))
    return (ends.cumsum(1) - ends.int() == 0).sum().item()


def _model(folder: str) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _rewards(completions: list[str], **_) -> list[float]:
    return [digit_share(completion) for completion in completions]


if __name__ == "__main__":
    serve(Trl())
