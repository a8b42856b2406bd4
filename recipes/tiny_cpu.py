"""The report's stages at a size that a laptop trains in minutes: 1.6 million parameters, real text, one MTP head.

Two things are peculiar to this size (docs/log.md): many small steps (2,048 tokens), because retrieval emerges by steps
and not by tokens; and a short first stage of repeated segments, longer than the first half of a window, from which the
full layers learn to copy by content before anything else.
"""

from dataclasses import replace

from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.demo.config import DemoConfig
from openmimo.train.config import CheckpointConfig, EvaluationConfig, ExtendConfig, PretrainConfig, Stage

TEXT = SourceConfig("python_stdlib", weight=0.3, max_megabytes=8.0)
REPEATS = SourceConfig(
    "repeats", weight=0.3, options={"alphabet": "characters", "min_length": 64, "min_period": 20, "max_period": 31}
)


def needles(*, weight: float, min_length: int, num_pairs: int) -> SourceConfig:
    """Retrieval examples of `min_length` tokens up to a whole row, every fact of which is asked."""
    return SourceConfig("needles", weight=weight, options={"min_length": min_length, "num_pairs": num_pairs})


def mixture(*sources: SourceConfig) -> MixtureConfig:
    """Five percent held out: the corpus is small, and one percent of it would be three files."""
    return MixtureConfig(sources, validation_fraction=0.05)


def pretrain() -> PretrainConfig:
    """Copying, then the report's three stages: general, more text, and a longer context with a larger RoPE base."""
    general = mixture(TEXT, REPEATS, needles(weight=0.4, min_length=64, num_pairs=8))
    more_text = mixture(replace(TEXT, weight=0.6), needles(weight=0.4, min_length=64, num_pairs=6))
    long = mixture(replace(TEXT, weight=0.5), needles(weight=0.5, min_length=64, num_pairs=4))
    return PretrainConfig(
        run_folder="runs/tiny_cpu",
        model="tiny",
        seed=1,  # retrieval is learned by some seeds within these steps and not by others (docs/log.md)
        stages=(
            Stage(
                name="copy", steps=250, sequence_length=64, rows=32, warmup_steps=40, constant_steps=210, peak_lr=3e-3,
                end_lr=3e-3, mixture=mixture(REPEATS), mtp_weight=0.3, bias_rate=1e-2,
            ),
            Stage(
                name="general", steps=450, sequence_length=64, rows=32, constant_steps=450, peak_lr=3e-3, end_lr=3e-3,
                mixture=general, mtp_weight=0.3, bias_rate=1e-2,
            ),
            Stage(
                name="text", steps=150, sequence_length=128, rows=16, peak_lr=3e-3, end_lr=1e-3, mixture=more_text,
                mtp_weight=0.1, bias_rate=1e-2,
            ),
            Stage(
                name="long", steps=75, sequence_length=256, rows=16, peak_lr=1e-3, end_lr=3e-4, mixture=long,
                mtp_weight=0.1, bias_rate=1e-4, full_rope_theta=40_000.0,
            ),
        ),
        rows_per_microbatch=32,
        threads=1,  # at this size a second thread gains nothing, and spins where cores are shared (docs/log.md)
        checkpoints=CheckpointConfig(every_steps=200),
        evaluation=EvaluationConfig(every_steps=200, batches=2),
    )  # fmt: skip


def extend() -> ExtendConfig:
    """Four times the context for a checkpoint of `pretrain`, with four times the RoPE base and three MTP heads."""
    return ExtendConfig(
        checkpoint="runs/tiny_cpu/model",
        run_folder="runs/tiny_cpu_extended",
        seed=1,
        mixture=mixture(replace(TEXT, weight=0.4), needles(weight=0.6, min_length=64, num_pairs=4)),
        sequence_length=1024,
        full_rope_theta=160_000.0,
        steps=100,
        rows=4,
        rows_per_microbatch=4,
        threads=1,
        peak_lr=1e-3,
        end_lr=1e-4,
        mtp_weight=0.3,
        mtp_heads=3,
        bias_rate=1e-4,
        checkpoints=CheckpointConfig(every_steps=50),
        evaluation=EvaluationConfig(every_steps=50, batches=2),
    )


def demo() -> DemoConfig:
    """Both, with the measurements between them."""
    return demo_in("runs/demo")


def demo_in(folder: str) -> DemoConfig:
    """The demo with everything in `folder`."""
    return DemoConfig(
        folder=folder,
        pretrain=replace(pretrain(), run_folder=f"{folder}/pretrain"),
        extend=replace(extend(), run_folder=f"{folder}/extend", checkpoint=f"{folder}/pretrain/model"),
    )
