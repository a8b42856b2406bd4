"""Expert-load traces of a small model with no balance, the balance loss, and bias balancing (docs/experts.md).

    python -m benchmarks.expert_traces FOLDER [CONDITION] [STEPS] [SEED]

Each condition is a pre-training run on the text of Python's standard library, in a folder of its own.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.model.config import ModelConfig
from openmimo.model.hf_config import config_to_hf
from openmimo.model.presets import hybrid_layers, tiny
from openmimo.train.config import CheckpointConfig, EvaluationConfig, Phase, PretrainConfig, TokenizerConfig
from openmimo.train.pretrain import pretrain

# balance_weight and bias_rate of each condition
CONDITIONS = {"none": (0.0, 0.0), "loss": (1e-2, 0.0), "bias": (0.0, 1e-3)}


def model_config() -> ModelConfig:
    """A dense layer and two sparse layers of 16 experts, two per token."""
    base = tiny()
    assert base.moe is not None
    full, sliding = base.layers[0].attention, base.layers[1].attention
    return replace(
        base,
        hidden_size=64,
        dense_ffn_dim=96,
        layers=hybrid_layers(3, full=full, sliding=sliding, moe=True),
        moe=replace(base.moe, num_experts=16, expert_dim=32),
        mtp=None,
    )


def run_config(folder: Path, condition: str, *, steps: int, seed: int) -> PretrainConfig:
    """The run of a condition: 512 tokens a step at a constant learning rate after the warm-up."""
    balance_weight, bias_rate = CONDITIONS[condition]
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model_config.json"
    model.write_text(json.dumps(config_to_hf(model_config())))
    phase = Phase(
        condition, steps=steps, sequence_length=64, global_batch_size=8, learning_rate=2e-3, end_learning_rate=2e-3,
        warmup_steps=100, mixture=MixtureConfig((SourceConfig("python_stdlib"),)), bias_rate=bias_rate,
    )  # fmt: skip
    return PretrainConfig(
        run_folder=str(folder / f"{condition}-{seed}"), stages=(phase,), model=str(model), seed=seed, device="cpu",
        dtype="float32", threads=1, balance_weight=balance_weight, expert_trace=True, log_every_steps=100,
        tokenizer=TokenizerConfig(train_megabytes=0.5), evaluation=EvaluationConfig(every_steps=1000, batches=2),
        checkpoints=CheckpointConfig(every_steps=500),
    )  # fmt: skip


if __name__ == "__main__":
    destination, names, run_seed = Path(sys.argv[1]), sys.argv[2:3] or list(CONDITIONS), int((sys.argv[4:5] or "0")[0])
    num_steps = int((sys.argv[3:4] or "4000")[0])
    for name in names:
        pretrain(run_config(destination, name, steps=num_steps, seed=run_seed))
