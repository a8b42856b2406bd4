"""Training of the audio tokenizer: both stages on synthetic speech, resumption, and the losses."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from openmimo.core.errors import ConfigError, Interrupted
from openmimo.model.audio.config import AudioTokenizerConfig, StackConfig, preset
from openmimo.model.audio.tokenizer import AudioTokenizer, load_audio_tokenizer
from openmimo.train.audio.tokenizer import run as run_module
from openmimo.train.audio.tokenizer import trainer as trainer_module
from openmimo.train.audio.tokenizer.clips import Clip, fixed_segments, random_segments
from openmimo.train.audio.tokenizer.config import (
    AudioTokenizerTrainConfig,
    DiscriminatorConfig,
    LossWeights,
    QuantizerTraining,
    TextModelConfig,
    TokenizerPhase,
)
from openmimo.train.audio.tokenizer.discriminators import Discriminators
from openmimo.train.audio.tokenizer.losses import MultiScaleMel, adversarial_loss, discriminator_loss, feature_loss
from openmimo.train.audio.tokenizer.run import train_tokenizer
from openmimo.train.audio.tokenizer.start import set_initial_values
from openmimo.train.audio.tokenizer.text import TextModel
from openmimo.train.audio.tokenizer.trainer import Trainer
from openmimo.train.config import CheckpointConfig
from recipes import audio_tokenizer as recipe

RATE = 24_000
_STACK = StackConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=16, right_positions=0)
_SHAPE = AudioTokenizerConfig(
    encoder=_STACK, decoder=_STACK, vocoder=_STACK, codebook_sizes=(8, 4, 4), decoder_norm="frame"
)  # fmt: skip


def synthetic_clips(count: int, *, seconds: float = 0.2) -> list[Clip]:
    """Gliding tones with noise that gets louder, whose text names their pitch."""
    noise = torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(0))
    clips = []
    for index in range(count):
        n = torch.arange(round(seconds * RATE)) / RATE
        pitch = 200 * (1 + index % 5)
        samples = 0.3 * torch.sin(2 * math.pi * (pitch * n + 150 * n**2)) + noise * n / seconds * 0.2
        clips.append(Clip(f"tone {index}", f"tone {pitch}", lambda samples=samples: samples))
    return clips


def run_config(folder, **changes) -> AudioTokenizerTrainConfig:
    phase = TokenizerPhase(
        name="first", kind="reconstruction", steps=4, batch_size=2, segment_seconds=0.2, learning_rate=1e-3,
        end_learning_rate=1e-4, weights=LossWeights(coarse_mel=1.0, text=1.0),
    )  # fmt: skip
    second = replace(phase, name="second", kind="adversarial", steps=2)
    values = {
        "stages": (phase, second),
        "quantizer": QuantizerTraining(start_step=1, start_batches=2, iterations=3),
        "text_model": TextModelConfig(dim=16, num_layers=1, num_heads=2),
        "discriminators": DiscriminatorConfig(periods=(2,), stft_samples=(256,), channels=4, max_channels=8),
        "checkpoints": CheckpointConfig(every_steps=3),
        "log_every_steps": 1,
        "evaluate_every_steps": 4,
        "evaluation_clips": 2,
        "device": "cpu",
    }
    return AudioTokenizerTrainConfig(str(folder), **values | changes)


def open_trainer(
    config: AudioTokenizerTrainConfig, *, checkpoint=None, shape: AudioTokenizerConfig = _SHAPE
) -> Trainer:
    torch.manual_seed(config.seed)
    tokenizer = AudioTokenizer(shape)
    clips = synthetic_clips(6)
    return Trainer(config, tokenizer, clips, clips[:2], checkpoint=checkpoint, console=Console(quiet=True))


def rows_of(trainer: Trainer) -> list[dict]:
    return [json.loads(line) for line in trainer.metrics.path.read_text().splitlines()]


def losses_of(trainer: Trainer) -> list[dict]:
    rows = [row for row in rows_of(trainer) if "lr" in row]
    return [{name: value for name, value in row.items() if name.startswith("loss")} for row in rows]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """The first stage, the start of the codebooks and the second stage; the checkpoint is between them."""
    whole = open_trainer(run_config(tmp_path / "whole"))
    whole.run()
    stopped = open_trainer(run_config(tmp_path / "parts"))
    stopped.run(stop_after_step=3)
    newest = stopped.checkpoints.newest_intact()
    assert newest is not None and newest.name == "step-00000003"
    torch.manual_seed(99)  # no generator outside the run may matter
    resumed = open_trainer(run_config(tmp_path / "parts"), checkpoint=newest)
    resumed.run()
    for name, tensor in whole.modules.state_dict().items():
        assert torch.equal(tensor, resumed.modules.state_dict()[name]), name
    rows = rows_of(resumed)
    assert [row["step"] for row in rows if "lr" in row] == [1, 2, 3, 4, 5, 6]
    assert losses_of(resumed) == losses_of(whole)
    evaluation = next(row for row in rows if "validation/mel" in row)
    assert len(evaluation["validation/mel_by_codebooks"]) == len(evaluation["validation/perplexity"]) == 3


def test_without_weights_of_the_discriminators_none_are_trained(tmp_path):
    first, second = run_config(tmp_path).stages
    second = replace(second, weights=LossWeights(adversarial=0.0, feature_matching=0.0))
    trainer = open_trainer(run_config(tmp_path, stages=(first, second)))
    before = {name: tensor.clone() for name, tensor in trainer.modules.state_dict().items()}
    trainer.run()
    after = trainer.modules.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after if name.startswith("discriminators."))
    assert not torch.equal(before["tokenizer.decoder.vocoder.head.out.weight"],
                           after["tokenizer.decoder.vocoder.head.out.weight"])  # fmt: skip
    assert "loss/adversarial" not in losses_of(trainer)[-1]


def test_the_second_stage_trains_the_decoder_only(tmp_path):
    trainer = open_trainer(run_config(tmp_path))
    trainer.run(stop_after_step=4)
    before = {name: tensor.clone() for name, tensor in trainer.modules.state_dict().items()}
    trainer.run(stop_after_step=5)
    changed = {name for name, tensor in trainer.modules.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[1 if name.startswith("tokenizer") else 0] for name in changed} == {
        "decoder",
        "discriminators",
    }


def test_the_codebooks_start_at_their_step_from_k_means(tmp_path):
    trainer = open_trainer(run_config(tmp_path))
    trainer.run(stop_after_step=1)
    book = trainer.tokenizer.encoder.quantizer.books[0]
    assert not book.inited and "loss/commitment" not in losses_of(trainer)[-1]
    trainer.run(stop_after_step=2)
    assert book.inited and losses_of(trainer)[-1]["loss/commitment"] > 0


def test_an_interrupted_run_saves_its_step(tmp_path, monkeypatch):
    import os
    import signal

    trainer = open_trainer(run_config(tmp_path))
    after = trainer._after_step

    def interrupt(*arguments, **named):
        after(*arguments, **named)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "_after_step", interrupt)
    with pytest.raises(Interrupted, match="the checkpoint of step 1 is saved"):
        trainer.run()
    assert trainer.checkpoints.newest_step() == 1


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    config = run_config(tmp_path)
    trainer = open_trainer(replace(config, optimizer=replace(config.optimizer, max_skipped_steps=5)))
    trainer.run(stop_after_step=2)
    before = {name: tensor.clone() for name, tensor in trainer.modules.state_dict().items()}
    monkeypatch.setattr(trainer_module.F, "l1_loss", lambda a, b: (a * float("nan")).mean())
    trainer.run(stop_after_step=3)
    for name, tensor in trainer.modules.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.slow
def test_a_run_ends_with_a_tokenizer_and_a_report_and_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "open_clips", lambda corpus, split, rate: synthetic_clips(4))
    monkeypatch.setattr(run_module, "preset", lambda name: _SHAPE)
    config = run_config(tmp_path / "run")
    folder = train_tokenizer(config, console=Console(quiet=True))
    loaded = load_audio_tokenizer(folder)
    assert loaded.config == _SHAPE
    report = (tmp_path / "run" / "report.html").read_text()
    assert report.count("<img") == 3 and "perplexity" in report
    weights = (folder / "model.safetensors").read_bytes()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert train_tokenizer(config, console=Console(quiet=True)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="seed was 0 and is now 1"):
        train_tokenizer(replace(config, seed=1), console=Console(quiet=True))
    from_ours = replace(config, run_folder=str(tmp_path / "again"), tokenizer=None, init_from=str(folder))
    train_tokenizer(from_ours, console=Console(quiet=True))
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_training_lowers_the_mel_distance(tmp_path):
    config = run_config(tmp_path, evaluate_every_steps=10)
    first = replace(config.stages[0], steps=60, batch_size=4, learning_rate=3e-3)
    config = replace(config, stages=(first,), quantizer=replace(config.quantizer, start_step=20))
    trainer = open_trainer(config, shape=preset("tiny_codec"))
    trainer.run()
    rows = [row for row in rows_of(trainer) if "loss/mel" in row]
    assert rows[-1]["loss/mel"] < 0.5 * rows[0]["loss/mel"]


def test_a_new_tokenizer_starts_at_the_levels_of_the_data():
    torch.manual_seed(0)
    tokenizer = AudioTokenizer(_SHAPE)
    waveform_BS = fixed_segments(synthetic_clips(4), 4, 4800).waveform_BS
    set_initial_values(tokenizer, waveform_BS)
    with torch.no_grad():
        mel_BLM = tokenizer.log_mel(waveform_BS)
        states_BLD = torch.randn(1, 5, 16)
        turn = (torch.ones(5, 8), torch.zeros(5, 8))
        layer = tokenizer.decoder.layers[0]
        torch.testing.assert_close(layer(states_BLD, turn), states_BLD + layer.fc2.bias + layer.self_attn.out_proj.bias)
        read = tokenizer.encoder.conv1(mel_BLM.transpose(1, 2))[:, :, 1:-1]
        written = tokenizer.decoder.coarse_mel(torch.randn(4, 20, 16)).mean((0, 1))
    assert read.mean() == pytest.approx(0.0, abs=0.1) and 0.1 < read.std() < 3
    assert (written - mel_BLM.mean((0, 1))).abs().mean() < 0.3 * mel_BLM.std()


# --- data ------------------------------------------------------------------------------------------------------------


def test_segments_keep_the_text_of_whole_clips_only():
    clips = [
        Clip("short", "short", lambda: torch.full((100,), 0.5)),
        Clip("long", "long", lambda: torch.arange(1000) / 1000),
    ]
    segments = random_segments(clips, 20, 400, torch.Generator().manual_seed(0))
    assert set(segments.texts) == {"short", None}
    for row, text in zip(segments.waveform_BS, segments.texts, strict=True):
        if text == "short":
            assert row.count_nonzero() == 100 and set(row.unique().tolist()) == {0.0, 0.5}
        else:
            torch.testing.assert_close(row[1:] - row[:-1], torch.full((399,), 0.001), atol=1e-6, rtol=0)
    starts = {int(row.nonzero()[0]) for row, text in zip(*segments, strict=True) if text}
    assert len(starts) > 1
    again = fixed_segments(clips, 5, 400)
    assert len(again.texts) == 2 and torch.equal(again.waveform_BS, fixed_segments(clips, 5, 400).waveform_BS)


# --- losses ----------------------------------------------------------------------------------------------------------


def test_the_scales_of_the_mel_distance_are_those_of_the_paper():
    distance = MultiScaleMel(RATE, (5, 6, 7))
    shapes = [(t.window_samples, t.hop_samples, t.bands.shape[1]) for t in distance.transforms]
    assert shapes == [(240, 120, 32), (480, 240, 64), (960, 480, 128)]
    tone = torch.sin(torch.arange(4800) * 0.1)[None]
    assert distance(tone, tone) == 0
    assert 0.2 < distance(tone * 2, tone) < math.log(2) + 1e-3  # bands at the floor do not change


def test_hinge_losses():
    real, decoded = [[torch.zeros(3), torch.tensor([2.0, 0.5])]], [[torch.ones(3), torch.tensor([-2.0, 0.0])]]
    assert discriminator_loss(real, decoded) == pytest.approx(0.25 + 0.5)
    assert adversarial_loss(decoded) == pytest.approx(1.0)
    features = [[torch.full((4,), 2.0), torch.zeros(1)]]
    assert feature_loss(features, [[torch.full((4,), 3.0), torch.ones(1)]]) == pytest.approx(0.5)


def test_discriminators_learn_and_their_convolutions_have_norm_one():
    torch.manual_seed(0)
    discriminators = Discriminators(
        DiscriminatorConfig(periods=(2, 3), stft_samples=(128,), channels=4, max_channels=8)
    )  # fmt: skip
    optimizer = torch.optim.Adam(discriminators.parameters(), lr=5e-3)
    tone, noise = torch.sin(torch.arange(1200) * 0.3)[None], torch.randn(1, 1200) * 0.7
    losses = []
    for _ in range(12):
        loss = discriminator_loss(discriminators(tone), discriminators(noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    weight = discriminators.members[0].layers[1].weight
    assert float(torch.linalg.matrix_norm(weight.detach().flatten(1), ord=2)) == pytest.approx(1.0, abs=0.1)


def test_the_text_loss_reaches_the_audio_and_learns_what_it_says():
    generator = torch.Generator().manual_seed(0)
    model = TextModel(TextModelConfig(dim=32, num_layers=1, num_heads=2), 8, generator)
    audio = torch.randn(4, 6, 8, generator=generator).requires_grad_()
    texts = ["one", None, "two", "x" * 300]
    loss = model(audio, texts)
    assert loss is not None and 3 < float(loss.detach()) < 8  # ln 258 is 5.55
    loss.backward()
    assert (audio.grad.abs().sum((1, 2)) > 0).tolist() == [True, False, True, False]
    assert model(audio, [None, "", None, "x" * 300]) is None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(audio.detach(), texts)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5


# --- configs ---------------------------------------------------------------------------------------------------------


def test_recipes_are_complete():
    tiny = recipe.tiny()
    assert [stage.kind for stage in tiny.stages] == ["reconstruction", "adversarial"]
    weights = recipe.released().stages[0].weights
    assert (weights.text, weights.mel, weights.commitment, weights.feature_matching) == (10, 1, 1, 2)
    assert tiny.place_of(tiny.stages[0].steps) == (tiny.stages[1], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, "no stages"),
        ({"tokenizer": "huge"}, "there is no audio tokenizer 'huge'"),
        ({"init_from": "x"}, "either tokenizer"),
        ({"dtype": "bfloat16"}, "float32"),
        ({"activation_checkpointing": True}, "no effect"),
        ({"quantizer": QuantizerTraining(start_step=4)}, "start_step 4 must be below the 4 steps"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match="codebooks are untrained"):
        run_config(tmp_path, stages=run_config(tmp_path).stages[1:])
