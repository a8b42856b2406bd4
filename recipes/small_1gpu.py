"""A hybrid MoE of 170 million parameters on one GPU in an evening: Wikipedia text and Python, at 4K, then 32K tokens.

The post-training settings are scaled from `tiny_cpu` and have not been run at this size. `openmimo chain small_1gpu`
runs everything in pieces.
"""

from dataclasses import replace

from openmimo.data.config import MixtureConfig, SourceConfig, TaskConfig, demonstrations
from openmimo.demo.config import ChainConfig
from openmimo.engine.config import EngineConfig
from openmimo.rl.config import CompareConfig, MopdConfig, RlConfig, RlEvaluation, RlSource
from openmimo.train.config import (
    CheckpointConfig,
    EvaluationConfig,
    ExtendConfig,
    Phase,
    PretrainConfig,
    SftConfig,
    TokenizerConfig,
)

WIKIPEDIA = SourceConfig("enwik8", weight=0.6)
PYTHON = SourceConfig("python_stdlib", weight=0.2)
NEEDLES = SourceConfig("needles", weight=0.2, options={"min_length": 256, "num_pairs": 8})


def pretrain() -> PretrainConfig:
    """The three stages of the report with about half a billion tokens, 64K tokens per step."""
    mixture = MixtureConfig((WIKIPEDIA, PYTHON, NEEDLES))
    return PretrainConfig(
        run_folder="runs/small_1gpu",
        model="small",
        stages=(
            Phase(
                name="1", steps=6000, sequence_length=4096, global_batch_size=16, initial_batch_size=4,
                batch_warmup_steps=500, warmup_steps=300, constant_steps=3300, learning_rate=1e-3,
                end_learning_rate=3e-4, mixture=mixture, mtp_weight=0.3, bias_rate=1e-3,
            ),
            Phase(
                name="2", steps=1500, sequence_length=4096, global_batch_size=16, learning_rate=3e-4,
                end_learning_rate=1e-4, mixture=mixture, mtp_weight=0.1, bias_rate=1e-3,
            ),
            Phase(
                name="3", steps=400, sequence_length=32_768, global_batch_size=2, learning_rate=1e-4,
                end_learning_rate=3e-5, mixture=mixture, mtp_weight=0.1, bias_rate=1e-5, full_rope_theta=5_000_000.0,
            ),
        ),
        micro_batch_size=4,
        checkpoints=CheckpointConfig(every_steps=500),
        evaluation=EvaluationConfig(every_steps=500, batches=4),
        tokenizer=TokenizerConfig(train_megabytes=40.0),
        tensorboard=True,
    )  # fmt: skip


def extend() -> ExtendConfig:
    """Context extension to 64K, with three MTP heads."""
    return ExtendConfig(
        checkpoint="runs/small_1gpu/model",
        run_folder="runs/small_1gpu_extended",
        mixture=MixtureConfig((WIKIPEDIA, PYTHON, NEEDLES)),
        sequence_length=65_536,
        full_rope_theta=10_000_000.0,
        steps=200,
        global_batch_size=1,
        learning_rate=1e-4,
        end_learning_rate=1e-5,
        mtp_heads=3,
        activation_checkpointing=True,
    )


DEMONSTRATED = (
    TaskConfig("addition", 1, 6), TaskConfig("countdown", 3, 4), TaskConfig("program", 1, 2),
    TaskConfig("boolean", 2, 8), TaskConfig("lookup", 4, 24, options={"hops": 2}),
)  # fmt: skip
ROLLOUTS = EngineConfig(max_sequences=512, prefill_tokens=16_384, mixed_prefill_tokens=4096, speculative=False)


def domain(name: str, level: int, *, samples_per_prompt: int = 16, **options: int) -> RlSource:
    """A source of problems of one task family at one difficulty."""
    task = {"name": name, "min_difficulty": level, "max_difficulty": level, "options": options}
    return RlSource(name=name, samples_per_prompt=samples_per_prompt, max_answer_tokens=256, options={"task": task})


DOMAINS = {"addition": 8, "countdown": 4, "program": 3}


def sft() -> SftConfig:
    """Demonstrations for the extended model. For your own conversations, use the source `chat` (options: path)."""
    return SftConfig(
        checkpoint="runs/small_1gpu_extended/model",
        run_folder="runs/small_1gpu_sft",
        mixture=MixtureConfig((demonstrations(*DEMONSTRATED),)),
        steps=2000,
        sequence_length=2048,
        global_batch_size=32,
        micro_batch_size=32,
        learning_rate=3e-4,
        end_learning_rate=3e-5,
        warmup_steps=100,
    )


def rl_on(name: str) -> RlConfig:
    """Reinforcement learning of the teacher of one domain."""
    return RlConfig(
        checkpoint="runs/small_1gpu_sft/model",
        run_folder=f"runs/small_1gpu_rl_{name}",
        sources=(domain(name, DOMAINS[name]),),
        steps=300,
        groups_per_step=64,
        updates_per_step=4,
        learning_rate=2e-5,
        end_learning_rate=5e-6,
        warmup_steps=10,
        mtp_weight=0.0,
        max_running=1024,
        tokens_per_microbatch=32_768,
        engine=ROLLOUTS,
        evaluation=RlEvaluation(every_steps=50, problems=500, temperature=1.0),
    )


def rl() -> RlConfig:
    """The teacher of countdown. The other teachers are `addition` and `program`."""
    return rl_on("countdown")


def addition() -> RlConfig:
    """The teacher of addition."""
    return rl_on("addition")


def program() -> RlConfig:
    """The teacher of program writing, with the test-difficulty-driven reward."""
    return rl_on("program")


def mopd() -> MopdConfig:
    """One student of the three teachers, with itself as the teacher of logic."""
    own = domain("boolean", 8, samples_per_prompt=4)
    return MopdConfig(
        checkpoint="runs/small_1gpu_sft/model",
        run_folder="runs/small_1gpu_mopd",
        sources=(*(domain(name, level, samples_per_prompt=4) for name, level in DOMAINS.items()), own),
        teachers={name: f"runs/small_1gpu_rl_{name}/model" for name in DOMAINS} | {"boolean": "self"},
        signal="full",
        steps=150,
        groups_per_step=256,
        learning_rate=3e-5,
        end_learning_rate=3e-6,
        warmup_steps=10,
        max_running=1024,
        tokens_per_microbatch=32_768,
        engine=ROLLOUTS,
        evaluation=RlEvaluation(every_steps=25, problems=500, temperature=1.0),
    )


def compare() -> CompareConfig:
    """The fine-tuned model, the teachers and the student in all four domains."""
    teachers: dict[str, tuple[str, ...]] = {
        f"{name} teacher": (f"runs/small_1gpu_rl_{name}/model",) for name in DOMAINS
    }
    return CompareConfig(
        run_folder="runs/small_1gpu_compare",
        base="runs/small_1gpu_sft/model",
        sources=(*(domain(name, level) for name, level in DOMAINS.items()), domain("boolean", 8)),
        models=teachers | {"student": ("runs/small_1gpu_mopd/model",)},
        teachers={name: f"{name} teacher" for name in DOMAINS},
        problems=1000,
        temperature=1.0,
        engine=ROLLOUTS,
    )


def chain() -> ChainConfig:
    """From random weights to the student, in pieces of a few minutes on one card (docs/rl.md)."""
    return ChainConfig(
        folder="runs/small_1gpu_chain",
        pretrain=replace(pretrain(), checkpoints=CheckpointConfig(every_steps=250)),
        extend=extend(),
        sft=sft(),
        teachers=tuple(rl_on(name) for name in DOMAINS),
        mopd=mopd(),
        compare=compare(),
    )
