"""Training of an audio language model: the loss, rows, the order of documents, resumed runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file

from openmimo.core.errors import ConfigError, DataError, Interrupted
from openmimo.core.metrics import read_metrics
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.audio.engine import AudioEngine, AudioParams
from openmimo.model.audio.language import AudioLanguageModel, load_audio_model
from openmimo.model.audio.language_config import audio_model_config, tiny_audio
from openmimo.model.audio.sequence import (
    ALL_SPECIAL_TOKENS,
    AudioPart,
    SequenceBuilder,
    SpeechPart,
    TextPart,
    packed,
)
from openmimo.model.audio.tokenizer import AudioTokenizer, load_audio_tokenizer, preset, save_audio_tokenizer
from openmimo.model.config import training_flops_per_token
from openmimo.model.context import PackedContext
from openmimo.train.audio import rows, run
from openmimo.train.audio.config import AudioPhase, AudioTrainConfig, audio_rows
from openmimo.train.audio.loader import AudioLoader
from openmimo.train.audio.loss import LossWeights, audio_loss, targets
from openmimo.train.audio.rows import Codes, read_mixture, read_rows
from openmimo.train.audio.run import train_audio
from openmimo.train.audio.trainer import AudioTrainer, part_of_name
from openmimo.train.config import CheckpointConfig, EvaluationConfig

WEIGHTS = LossWeights(100.0, (12.0, 8.0, 6.0, 4.0, 2.0, 2.0, 1.0, 1.0), 0.01)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["hello hello hello world, what a fine day it is"] * 5, 300, ALL_SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Two documents; the second begins with a patch, which is never predicted."""
    codes = torch.randint(0, 128, (22, 8), generator=torch.Generator().manual_seed(0))
    builder = SequenceBuilder(tokenizer, tiny_audio())
    first = [TextPart("hello "), AudioPart(codes), SpeechPart("what a fine day", codes[:9], has_loss=True)]
    second = [AudioPart(codes[3:], is_bounded=False, has_loss=True), TextPart(" hello", has_loss=True)]
    return packed([builder.build(first), builder.build(second)])


@pytest.fixture(scope="module")
def model():
    model = AudioLanguageModel(tiny_audio())
    model.initialize(torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def test_the_loss_equals_a_plain_computation(model, batch, tokenizer):
    """Position by position, with log-softmax of whole logits; documents one at a time."""
    empty = tokenizer.special_tokens["<|empty|>"]
    text_sum = text_weight = 0.0
    codebook_sums, num_codes = [0.0] * 8, 0
    first = 0
    for length in batch.document_lengths:
        rows = slice(first, first + length)
        document = type(batch)(
            *(tensor[rows] for tensor in (batch.text_ids_T, batch.codes_THQ, batch.is_patch_T, batch.has_loss_T)),
            (length,),
        )
        states_TD = model.states(document, PackedContext((length,))).post_norm_TD
        logprobs_TV = model.head(states_TD).log_softmax(-1)
        for place in range(1, length):
            if not document.has_loss_T[place]:
                continue
            token = int(document.text_ids_T[place])
            weight = 0.01 if token == empty else 1.0
            text_sum -= weight * float(logprobs_TV[place - 1, token])
            text_weight += weight
            if token == empty:
                codes_HQ = document.codes_THQ[place]
                num_codes += 4
                for number, logits in enumerate(model.local_logits(states_TD[place - 1][None], codes_HQ[None])):
                    codebook_sums[number] += float(F.cross_entropy(logits[0], codes_HQ[:, number], reduction="sum"))
        first += length
    means = [text_sum / text_weight, *(total / num_codes for total in codebook_sums)]
    weights = (100, 12, 8, 6, 4, 2, 2, 1, 1)
    expected = sum(weight * mean for weight, mean in zip(weights, means, strict=True)) / sum(weights)
    predicted = targets(batch, WEIGHTS)
    context = PackedContext(batch.document_lengths)
    loss, shares = audio_loss(model, batch, predicted, context, WEIGHTS, predicted.counts())
    torch.testing.assert_close(shares, torch.tensor(means), atol=1e-4, rtol=1e-4)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_understanding_alone_gives_the_patch_decoder_no_gradient(model, batch):
    weights = LossWeights(1.0, (0.0,) * 8, 0.0)
    predicted = targets(batch, weights)
    loss, _ = audio_loss(model, batch, predicted, PackedContext(batch.document_lengths), weights, predicted.counts())
    loss.backward()
    moved = {part_of_name(name) for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    assert moved == {"encoder", "backbone"}
    empty = batch.text_ids_T[batch.is_patch_T][0]
    assert not (predicted.labels_T == empty).any()


# --- runs ---


def random_codec(seed):
    torch.manual_seed(seed)
    return AudioTokenizer(preset("tiny_codec"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve clips of codes with words, as transcription and speech; an audio tokenizer of random weights."""
    folder = tmp_path_factory.mktemp("data")
    save_audio_tokenizer(random_codec(seed=0), str(folder / "codec"))
    draw, rows = np.random.default_rng(0), []
    for number in range(12):
        np.save(folder / f"{number}.npy", draw.integers(0, 128, (8, 8)))
        words, audio = f"hello {number}", {"type": "audio", "audio": f"{number}.npy"}
        user = [{"type": "text", "text": "Transcribe the following voice message."}, audio]
        rows.append([{"role": "user", "content": user}, {"role": "assistant", "thinking": False, "content": words}])
        spoken = [{"type": "text", "text": words}, audio]
        rows.append([{"role": "user", "content": words}, {"role": "assistant", "content": spoken}])
    rows.append({"content": [{"type": "text", "text": "hello"}, {"type": "speech", "text": "hello", "audio": "3.npy"}]})
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def run_config(data, folder, *, steps=4, model="tiny_audio"):
    mixture = MixtureConfig((audio_rows(str(data / "rows.jsonl")),), validation_fraction=0.2)
    phase = AudioPhase(
        name="speech", steps=steps, sequence_length=100, global_batch_size=3, learning_rate=1e-3,
        end_learning_rate=1e-3, mixture=mixture, encoder_learning_rate=2e-3,
    )  # fmt: skip
    return AudioTrainConfig(
        run_folder=str(folder), codec=str(data / "codec"), stages=(phase,), model=model, micro_batch_size=2,
        device="cpu", dtype="float32", threads=1, log_every_steps=1, checkpoints=CheckpointConfig(every_steps=2),
        evaluation=EvaluationConfig(every_steps=4, batches=2),
    )  # fmt: skip


def test_an_interrupted_run_ends_as_an_uninterrupted_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda folder: (folder / "report.html").write_text(""))  # plots are slow
    rates = {}
    scale_rates = AudioTrainer._scale_rates

    def recorded(self, phase):
        scale_rates(self, phase)
        rates.update({group["part"]: group["lr"] for group in self.optimizer.param_groups})

    monkeypatch.setattr(AudioTrainer, "_scale_rates", recorded)
    whole = train_audio(run_config(data, tmp_path / "whole"), console=QUIET)
    assert rates == {"encoder": pytest.approx(2e-3), "backbone": pytest.approx(1e-3), "decoder": pytest.approx(1e-3)}
    real, steps = AudioTrainer.train_step, []

    def interrupted(self, *given):
        if len(steps) == 2:
            raise Interrupted(2)
        steps.append(1)
        return real(self, *given)

    monkeypatch.setattr(AudioTrainer, "train_step", interrupted)
    with pytest.raises(Interrupted):
        train_audio(run_config(data, tmp_path / "parts"), console=QUIET)
    monkeypatch.setattr(AudioTrainer, "train_step", real)
    parts = train_audio(run_config(data, tmp_path / "parts"), console=QUIET)
    one, other = load_audio_model(whole).state_dict(), load_audio_model(parts).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    metrics = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert {"validation/main", "validation/codebook_7"} <= metrics[0].keys()
    assert {"loss/main", "loss/codebook_0", "lr"} <= metrics[1].keys()
    backbone = training_flops_per_token(load_audio_model(whole).config, 100) * metrics[1]["tokens"]
    assert backbone < metrics[1]["flops"] < 10 * backbone  # the local transformers count
    for name, codec in (("copied", load_audio_tokenizer(str(data / "codec"))), ("other", random_codec(seed=1))):
        save_audio_tokenizer(codec, str(tmp_path / name))
    moved = replace(run_config(data, tmp_path / "whole"), codec=str(tmp_path / "copied"))
    assert train_audio(moved, console=QUIET) == whole
    with pytest.raises(ConfigError, match="has another audio tokenizer than codec '.*other'"):
        train_audio(replace(moved, codec=str(tmp_path / "other")), console=QUIET)
    events = list(AudioEngine(whole).generate([{"role": "user", "content": "hello"}], AudioParams(max_tokens=2)))
    assert events[-1].finish_reason is not None
    assert train_audio(run_config(data, tmp_path / "whole"), console=QUIET) == whole  # it is finished


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_audio", "tiny_audio_hybrid"])
def test_a_model_learns_to_transcribe_its_clips(data, tmp_path, name):
    config = run_config(data, tmp_path / name, model=name, steps=150)
    stage = replace(config.stages[0], global_batch_size=6, mixture=MixtureConfig(config.stages[0].mixture.sources, 0.0))
    model = train_audio(replace(config, stages=(stage,), micro_batch_size=6), console=QUIET)
    engine = AudioEngine(model)
    hits = 0
    for number in range(12):
        codes = torch.from_numpy(np.load(data / f"{number}.npy"))
        content = [
            {"type": "text", "text": "Transcribe the following voice message."},
            {"type": "audio", "audio": codes},
        ]
        events = engine.generate([{"role": "user", "content": content}], AudioParams(max_tokens=8))
        hits += "".join(event.text or "" for event in events) == f"hello {number}"
    assert hits >= 11


@pytest.mark.slow
def test_a_text_model_becomes_the_backbone(data, tmp_path):
    from openmimo.model.hf import save_model
    from openmimo.model.mimo import MiMo

    text = MiMo(replace(audio_model_config("tiny_audio_hybrid").backbone, vocab_size=400))
    text.initialize(torch.Generator().manual_seed(5))
    save_model(text, tmp_path / "text", tokenizer=Tokenizer.train(["hello world"] * 3, 320))
    config = replace(run_config(data, tmp_path / "run", steps=1), model=None, init_from=str(tmp_path / "text"))
    stage = replace(config.stages[0], learning_rate=1e-9, end_learning_rate=0.0, encoder_learning_rate=None)
    model = load_audio_model(train_audio(replace(config, stages=(stage,)), console=QUIET))
    for name, tensor in text.state_dict().items():
        if "e_score_correction_bias" not in name:
            torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("[1, 2]", "message 0 needs a role"),
        ('{"messages": 5}', "must hold a list"),
        ("{", "line 1"),
        ('{"content": [{"type": "audio"}]}', '"text", "audio" or "speech"'),
        ('[{"role": "user", "content": [{"type": "audio", "audio": "none.wav"}]}]', "none.wav"),
        ('[{"role": "user", "content": [{"type": "audio", "audio": "damaged.npy"}]}]', "damaged.npy"),
        ('[{"role": "user", "content": "' + "hello " * 100 + '"}]', "raise it|Raise it"),
    ],
)
def test_bad_rows_are_refused_before_a_step(data, tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY damaged")
    config = run_config(data, tmp_path / "run")
    mixture = MixtureConfig((audio_rows(str(tmp_path / "rows.jsonl")),), validation_fraction=0.0)
    tokenizer = Tokenizer.train(["hello world"] * 3, 320, ALL_SPECIAL_TOKENS)
    tokenizer.save(tmp_path / "tokenizer")
    config = replace(config, stages=(replace(config.stages[0], mixture=mixture),))
    config = replace(config, tokenizer=replace(config.tokenizer, path=str(tmp_path / "tokenizer")))
    with pytest.raises((DataError, ConfigError), match=message):
        train_audio(config, console=QUIET)


def test_a_list_of_rows_is_read_as_the_toolkit_writes_it(tmp_path):
    conversation = [{"role": "user", "content": [{"type": "audio", "audio": "a/b.wav"}]}]
    (tmp_path / "rows.json").write_text(json.dumps([conversation, conversation]))
    rows = read_rows(tmp_path / "rows.json")
    assert [list(row.clips()) for row in rows] == [[tmp_path / "a/b.wav"]] * 2


def test_documents_follow_the_weights_and_every_pass_has_all(data, tokenizer):
    config = run_config(data, "unused").stages[0].mixture
    sources = read_mixture(replace(config, sources=(*config.sources, replace(config.sources[0], weight=3.0))))
    assert len(sources[0].train) + len(sources[0].held_out) == 25
    builder = SequenceBuilder(tokenizer, tiny_audio())

    def codes_of(path):
        return torch.from_numpy(np.load(path))

    def loader():
        return AudioLoader(sources, builder, codes_of, sequence_length=100, seed=3, stage=0)

    one = loader()
    first = [one.next_batch(2) for _ in range(60)]
    taken = one.state()["taken"]
    assert taken[1] / sum(taken) == pytest.approx(0.75, abs=0.1)
    other = loader()
    for _ in range(40):
        other.next_batch(2)
    resumed = loader()
    resumed.load_state(other.state())
    for expected in first[40:45]:
        assert torch.equal(resumed.next_batch(2).text_ids_T, expected.text_ids_T)
    assert max(sum(batch.document_lengths) for batch in first) <= 2 * 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_weights": (1.0,)}, "1 codebook_weights, but the model has 8"),
        ({"sequence_length": 5000}, "1024 positions"),
    ],
)
def test_phases_that_do_not_fit_the_model_are_refused(data, tmp_path, change, message):
    config = run_config(data, tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        train_audio(replace(config, stages=(replace(config.stages[0], **change),)), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_phases_without_sense_are_refused(data):
    stage = run_config(data, "unused").stages[0]
    with pytest.raises(ConfigError, match="all weights of the loss are 0"):
        replace(stage, text_weight=0.0, codebook_weights=(0.0,) * 8)
    with pytest.raises(ConfigError, match="'audio_rows'"):
        replace(stage, mixture=MixtureConfig((SourceConfig("python_stdlib"),)))
    with pytest.raises(ConfigError, match="no MTP heads"):
        replace(stage, mtp_weight=0.1)
    for changes in ({"loader_workers": 2}, {"z_weight": 1e-3}, {"balance_over": "batch"}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))} has no effect"):
            replace(run_config(data, "unused"), **changes)


def test_codes_before_an_interrupt_are_kept(tmp_path, monkeypatch):
    clips = [tmp_path / f"{number}.npy" for number in range(3)]
    for number, clip in enumerate(clips):
        np.save(clip, np.full((2, 8), number))
    stored, read = tmp_path / "codes" / "codes.safetensors", []

    def interrupted(clip):
        read.append(clip.name)
        if clip == clips[2] and len(read) == 3:
            assert len(load_file(stored)) == 2  # stored as it goes, so also where the process is killed
            raise KeyboardInterrupt
        return torch.from_numpy(np.load(clip)).int()

    monkeypatch.setattr(rows, "_read_codes", interrupted)
    monkeypatch.setattr(rows, "_STORED_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        Codes(tmp_path / "codes", None, "codec").prepare(clips, QUIET)
    codes = Codes(tmp_path / "codes", None, "codec")
    codes.prepare(clips, QUIET)
    assert read == ["0.npy", "1.npy", "2.npy", "2.npy"]
    assert [int(codes(clip)[0, 0]) for clip in clips] == [0, 1, 2]
