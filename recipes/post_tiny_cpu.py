"""Post-training at a size that a laptop trains in minutes: demonstrations, a teacher for each domain, then one student.

Every function is one command, and starts where the one before it ended:

    openmimo sft post_tiny_cpu
    openmimo rl post_tiny_cpu:addition        (and :sorting, :lookup)
    openmimo mopd post_tiny_cpu

The tasks are synthetic and their answers are known, so that demonstrations alone could teach everything. To leave
something to learn from rewards, fine-tuning sees mostly easy problems (docs/rl.md).
"""

from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.rl.config import MopdConfig, RlConfig, RlEvaluation, RlSource
from openmimo.train.config import CheckpointConfig, EvaluationConfig, SftConfig

START = "runs/demo/extend/model"
HARD = {"addition": 2, "sorting": 10, "lookup": 6, "reverse": 9}
EASY = {"addition": (1, 2), "sorting": (2, 8), "lookup": (1, 4), "reverse": (2, 7)}


def source(name: str) -> RlSource:
    """Hard problems of one family."""
    return RlSource(
        name=name,
        samples_per_prompt=8,
        max_answer_tokens=16,
        options={"task": {"name": name, "min_difficulty": HARD[name], "max_difficulty": HARD[name]}},
    )


def sft() -> SftConfig:
    """Demonstrations of four families, nearly all of them easy."""
    easy = tuple({"name": name, "min_difficulty": low, "max_difficulty": high} for name, (low, high) in EASY.items())
    hard = tuple(
        {"name": name, "min_difficulty": level, "max_difficulty": level, "weight": 0.05} for name, level in HARD.items()
    )
    return SftConfig(
        checkpoint=START,
        run_folder="runs/post/sft",
        mixture=MixtureConfig((SourceConfig("tasks", options={"tasks": easy + hard}),), validation_fraction=0.05),
        steps=300,
        sequence_length=256,
        rows=16,
        rows_per_microbatch=16,
        peak_lr=2e-3,
        end_lr=2e-4,
        warmup_steps=20,
        threads=1,
        checkpoints=CheckpointConfig(every_steps=100),
        evaluation=EvaluationConfig(every_steps=100, batches=2),
    )


def rl_of(*names: str) -> RlConfig:
    """GRPO on these families."""
    return RlConfig(
        checkpoint="runs/post/sft/model",
        run_folder=f"runs/post/rl_{'_'.join(names)}",
        sources=tuple(source(name) for name in names),
        steps=60,
        groups_per_step=16,
        learning_rate=3e-4,
        warmup_steps=5,
        threads=1,
        evaluation=RlEvaluation(every_steps=20, problems=100),
    )


def addition() -> RlConfig:
    """The teacher of addition."""
    return rl_of("addition")


def sorting() -> RlConfig:
    """The teacher of sorting."""
    return rl_of("sorting")


def lookup() -> RlConfig:
    """The teacher of looking up."""
    return rl_of("lookup")


def rl() -> RlConfig:
    """All three at once, for comparison."""
    return rl_of("addition", "sorting", "lookup")


def mopd() -> MopdConfig:
    """One student of three teachers, and of itself in the domain that has none."""
    names = ("addition", "sorting", "lookup", "reverse")
    return MopdConfig(
        checkpoint="runs/post/sft/model",
        run_folder="runs/post/mopd",
        sources=tuple(source(name) for name in names),
        teachers={name: f"runs/post/rl_{name}/model" for name in names[:3]} | {"reverse": "self"},
        steps=60,
        groups_per_step=64,
        learning_rate=3e-4,
        warmup_steps=5,
        threads=1,
        evaluation=RlEvaluation(every_steps=20, problems=100),
    )
