"""The stages of the report at a size that a laptop trains in minutes: 1.6 million parameters, real text, one MTP head.

Two settings are specific to this size (docs/log.md). Steps are many and small (2,048 tokens), because retrieval depends
on the number of steps and not of tokens. A short first stage repeats segments longer than half of a window, from which
the full layers learn to copy by content.

Post-training uses demonstrations of four tasks, a teacher for each of three tasks, and one student of all teachers:

    openmimo sft
    openmimo rl tiny_cpu:sorting; openmimo rl tiny_cpu:unique; openmimo rl tiny_cpu:reverse
    openmimo mopd && openmimo compare

Demonstrations could teach these tasks completely, because the answers are known. Most demonstrations are therefore
easier than the later problems, which leaves skills to learn from rewards (docs/rl.md).
"""

from dataclasses import replace

from openmimo.data.config import MixtureConfig, SourceConfig, TaskConfig, demonstrations
from openmimo.demo.config import DemoConfig
from openmimo.engine.config import EngineConfig
from openmimo.rl.config import CompareConfig, MopdConfig, RlConfig, RlEvaluation, RlSource
from openmimo.train.config import CheckpointConfig, EvaluationConfig, ExtendConfig, Phase, PretrainConfig, SftConfig

TEXT = SourceConfig("python_stdlib", weight=0.3, max_megabytes=8.0)
REPEATS = SourceConfig(
    "repeats", weight=0.3, options={"alphabet": "characters", "min_length": 64, "min_period": 20, "max_period": 31}
)


def needles(*, weight: float, min_length: int, num_pairs: int) -> SourceConfig:
    """Retrieval examples of `min_length` tokens up to a whole row, with a query for every fact."""
    return SourceConfig("needles", weight=weight, options={"min_length": min_length, "num_pairs": num_pairs})


def mixture(*sources: SourceConfig) -> MixtureConfig:
    """A mixture with five percent held out, because one percent of this small corpus would be three files."""
    return MixtureConfig(sources, validation_fraction=0.05)


def pretrain() -> PretrainConfig:
    """A copying stage, then the stages of the report: general, more text, longer context with a larger RoPE base."""
    general = mixture(TEXT, REPEATS, needles(weight=0.4, min_length=64, num_pairs=8))
    more_text = mixture(replace(TEXT, weight=0.6), needles(weight=0.4, min_length=64, num_pairs=6))
    long = mixture(replace(TEXT, weight=0.5), needles(weight=0.5, min_length=64, num_pairs=4))
    return PretrainConfig(
        run_folder="runs/tiny_cpu",
        seed=1,  # only some seeds learn retrieval within these steps (docs/log.md)
        stages=(
            Phase(
                name="copy", steps=250, sequence_length=64, global_batch_size=32, warmup_steps=40,
                learning_rate=3e-3, end_learning_rate=3e-3, mixture=mixture(REPEATS), mtp_weight=0.3, bias_rate=1e-2,
            ),
            Phase(
                name="general", steps=450, sequence_length=64, global_batch_size=32,
                learning_rate=3e-3, end_learning_rate=3e-3, mixture=general, mtp_weight=0.3, bias_rate=1e-2,
            ),
            Phase(
                name="text", steps=150, sequence_length=128, global_batch_size=16, learning_rate=3e-3,
                end_learning_rate=1e-3, mixture=more_text, mtp_weight=0.1, bias_rate=1e-2,
            ),
            Phase(
                name="long", steps=75, sequence_length=256, global_batch_size=16, learning_rate=1e-3,
                end_learning_rate=3e-4, mixture=long, mtp_weight=0.1, bias_rate=1e-4, full_rope_theta=40_000.0,
            ),
        ),
        micro_batch_size=32,
        threads=1,  # a second thread is no faster at this size, and spins on shared cores (docs/log.md)
        checkpoints=CheckpointConfig(every_steps=200),
        evaluation=EvaluationConfig(every_steps=200, batches=2),
    )  # fmt: skip


def extend() -> ExtendConfig:
    """Context extension by a factor of four for the model of `pretrain`, with 4x the RoPE base and three MTP heads."""
    return ExtendConfig(
        checkpoint="runs/tiny_cpu/model",
        run_folder="runs/tiny_cpu_extended",
        seed=1,
        mixture=mixture(replace(TEXT, weight=0.4), needles(weight=0.6, min_length=64, num_pairs=4)),
        sequence_length=1024,
        full_rope_theta=160_000.0,
        steps=100,
        global_batch_size=4,
        micro_batch_size=4,
        threads=1,
        learning_rate=1e-3,
        end_learning_rate=1e-4,
        mtp_weight=0.3,
        mtp_heads=3,
        bias_rate=1e-4,
        checkpoints=CheckpointConfig(every_steps=50),
        evaluation=EvaluationConfig(every_steps=50, batches=2),
    )


DEMONSTRATED = (
    TaskConfig("sorting", 2, 8), TaskConfig("unique", 2, 8), TaskConfig("reverse", 2, 6), TaskConfig("lookup", 1, 4),
)  # fmt: skip
ASKED = {
    "sorting": TaskConfig("sorting", 9, 10), "unique": TaskConfig("unique", 9, 10),
    "reverse": TaskConfig("reverse", 5, 6), "lookup": TaskConfig("lookup", 4, 8),
}  # fmt: skip
TAUGHT = ("sorting", "unique", "reverse")
ROLLOUTS = EngineConfig(max_sequences=128, prefill_tokens=4096, mixed_prefill_tokens=4096, speculative=False)


def domain(name: str, *, samples_per_prompt: int = 8) -> RlSource:
    """The source of problems that trains one teacher and compares all models."""
    task = ASKED[name]
    options = {"task": {"name": name, "min_difficulty": task.min_difficulty, "max_difficulty": task.max_difficulty}}
    return RlSource(name=name, samples_per_prompt=samples_per_prompt, max_answer_tokens=16, options=options)


def sft() -> SftConfig:
    """Demonstrations for the extended model of `extend`."""
    return SftConfig(
        checkpoint="runs/tiny_cpu_extended/model",
        run_folder="runs/tiny_cpu_sft",
        mixture=MixtureConfig((demonstrations(*DEMONSTRATED),), validation_fraction=0.05),
        steps=300,
        sequence_length=256,
        global_batch_size=8,
        micro_batch_size=8,
        threads=1,
        learning_rate=3e-3,
        end_learning_rate=2e-4,
        warmup_steps=20,
        mtp_weight=0.3,
        checkpoints=CheckpointConfig(every_steps=100),
        evaluation=EvaluationConfig(every_steps=100, batches=2),
    )


def rl_on(*names: str) -> RlConfig:
    """GRPO on these domains, from the model of `sft`."""
    return RlConfig(
        checkpoint="runs/tiny_cpu_sft/model",
        run_folder=f"runs/tiny_cpu_rl_{'_'.join(names)}",
        sources=tuple(domain(name) for name in names),
        steps=30,
        groups_per_step=16,
        updates_per_step=4,
        learning_rate=3e-4,
        end_learning_rate=1e-4,
        warmup_steps=5,
        mtp_weight=0.0,  # teachers generate without drafts
        threads=1,
        engine=ROLLOUTS,
        checkpoints=CheckpointConfig(every_steps=10),
        evaluation=RlEvaluation(every_steps=15, problems=100, temperature=1.0),
    )


def sorting() -> RlConfig:
    """The teacher of sorting."""
    return rl_on("sorting")


def unique() -> RlConfig:
    """The teacher of removing duplicates."""
    return rl_on("unique")


def reverse() -> RlConfig:
    """The teacher of reversing."""
    return rl_on("reverse")


def rl() -> RlConfig:
    """GRPO on all three domains at once, a baseline for distillation."""
    return rl_on(*TAUGHT)


def mopd() -> MopdConfig:
    """One student of three teachers, with its initial weights as the teacher of the remaining domain."""
    return MopdConfig(
        checkpoint="runs/tiny_cpu_sft/model",
        run_folder="runs/tiny_cpu_mopd",
        sources=tuple(domain(name, samples_per_prompt=2) for name in ASKED),
        teachers={name: f"runs/tiny_cpu_rl_{name}/model" for name in TAUGHT} | {"lookup": "self"},
        signal="full",
        steps=30,
        groups_per_step=64,
        learning_rate=7e-4,
        end_learning_rate=3e-5,
        warmup_steps=5,
        threads=1,
        engine=ROLLOUTS,
        checkpoints=CheckpointConfig(every_steps=10),
        evaluation=RlEvaluation(every_steps=15, problems=100, temperature=1.0),
    )


def compare() -> CompareConfig:
    """Evaluation of the fine-tuned model, the teachers and the student in all four domains."""
    teachers: dict[str, tuple[str, ...]] = {f"{name} teacher": (f"runs/tiny_cpu_rl_{name}/model",) for name in TAUGHT}
    return CompareConfig(
        run_folder="runs/tiny_cpu_compare",
        base="runs/tiny_cpu_sft/model",
        sources=tuple(domain(name) for name in ASKED),
        models=teachers | {"student": ("runs/tiny_cpu_mopd/model",)},
        teachers={name: f"{name} teacher" for name in TAUGHT},
        temperature=1.0,
        threads=1,
        engine=ROLLOUTS,
    )


def demo() -> DemoConfig:
    """All training commands and measurements, in `runs/demo`."""
    return demo_in("runs/demo")


def demo_in(folder: str) -> DemoConfig:
    """The demo with all runs in `folder`."""
    base, student = f"{folder}/sft/model", f"{folder}/mopd/model"
    taught = {name: f"{folder}/rl_{name}" for name in TAUGHT}
    models: dict[str, tuple[str, ...]] = {f"{name} teacher": (f"{run}/model",) for name, run in taught.items()}
    return DemoConfig(
        folder=folder,
        pretrain=replace(pretrain(), run_folder=f"{folder}/pretrain"),
        extend=replace(extend(), run_folder=f"{folder}/extend", checkpoint=f"{folder}/pretrain/model"),
        sft=replace(sft(), run_folder=f"{folder}/sft", checkpoint=f"{folder}/extend/model"),
        teachers=tuple(replace(rl_on(name), run_folder=run, checkpoint=base) for name, run in taught.items()),
        mopd=replace(
            mopd(),
            run_folder=f"{folder}/mopd",
            checkpoint=base,
            teachers={name: f"{run}/model" for name, run in taught.items()} | {"lookup": "self"},
        ),
        compare=replace(
            compare(),
            run_folder=f"{folder}/seesaw",
            base=base,
            models=models | {"student": (student,)},
        ),
    )
