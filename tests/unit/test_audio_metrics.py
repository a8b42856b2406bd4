"""Distances of the speech demo against values that are known, and the judge against properties of its features."""

import hashlib

import numpy as np
import pytest
import torch

from openmimo.core.errors import UserError
from openmimo.demo.audio.judge import SpeakerJudge, _mel_bands, _without_silence
from openmimo.demo.audio.metrics import chance_error_rate, error_rate, si_sdr
from openmimo.evals.audio.measures import edit_distance

TIME = np.arange(24_000) / 24_000


def test_distortion_is_the_ratio_of_powers_and_ignores_the_scale():
    target, noise = np.sin(2 * np.pi * 100 * TIME), np.sin(2 * np.pi * 300 * TIME)  # orthogonal, of equal power
    assert si_sdr(target + 0.1 * noise, target) == pytest.approx(20, abs=1e-6)
    assert si_sdr(5 * (target + 0.1 * noise), target) == pytest.approx(20, abs=1e-6)
    assert si_sdr(target + noise, target) == pytest.approx(0, abs=1e-6)


def test_distortion_of_silence_is_a_number():
    tone, silence = np.sin(TIME).astype(np.float32), np.zeros(24_000, np.float32)
    assert si_sdr(silence, tone) == si_sdr(tone, silence) == si_sdr(silence, silence) == -100


@pytest.mark.parametrize(
    ("found", "reference", "edits"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)],
)
def test_edits_between_texts(found, reference, edits):
    assert edit_distance(found, reference) == edits


def test_error_rates_count_edits_by_length_and_chance_uses_the_references_of_others():
    found = [["one", "two"], ["three"]]
    references = [["one", "two"], ["three", "four"]]
    assert error_rate(found, references) == 1 / 4
    assert chance_error_rate(found, references) == (2 + 2) / 4


def test_mel_bands_have_equal_areas_and_rise_to_half_the_rate():
    bands = _mel_bands()
    centers = bands.argmax(axis=1)
    assert bands.shape == (40, 201)
    assert (np.diff(centers) >= 0).all()
    wide = slice(10, None)  # narrower bands have few of the frequencies
    assert np.allclose(bands[wide].sum(axis=1) * 40, 1, atol=0.2)


def test_silence_is_cut_except_around_speech():
    speech = np.sin(2 * np.pi * 200 * np.arange(16_000) / 16_000)
    cut = _without_silence(np.concatenate([np.zeros(32_000), speech, np.zeros(32_000)]))
    assert 16_000 <= len(cut) <= 16_000 + 2 * 3 * 480 + 480
    assert np.isclose((cut**2).sum(), (speech**2).sum())


@pytest.mark.parametrize("seconds", [0.0, 1e-4, 0.1, 0.2])
def test_short_and_silent_recordings_are_embedded(seconds):
    speech = np.sin(np.arange(int(16_000 * seconds)) / 10).astype(np.float32)
    assert len(_without_silence(speech)) <= len(speech)
    for samples in (speech, 0 * speech):
        assert _judge().embed(samples, 16_000).shape == (256,)


def test_the_judge_needs_the_weights_of_its_package(tmp_path):
    torch.save({"model_state": {"linear.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not have the weights of Resemblyzer"):
        SpeakerJudge(tmp_path / "other.pt")
    (tmp_path / "bad.pt").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UserError, match="does not have the weights of Resemblyzer"):
        SpeakerJudge(tmp_path / "bad.pt")


def test_embeddings_do_not_depend_on_the_level():
    """Weights of the same shapes: the level is removed where a recording is quiet, and padding adds no window."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = _judge()
    samples = np.random.default_rng(0).standard_normal(24_000).astype(np.float32)
    quiet, quieter = judge.embed(0.01 * samples, 16_000), judge.embed(0.001 * samples, 16_000)
    assert np.allclose(quiet, quieter, atol=1e-4)
    assert np.linalg.norm(quiet) == pytest.approx(1, abs=1e-5)


def _judge() -> SpeakerJudge:
    judge = SpeakerJudge.__new__(SpeakerJudge)
    torch.nn.Module.__init__(judge)
    judge.lstm = torch.nn.LSTM(40, 256, 3, batch_first=True)
    judge.linear = torch.nn.Linear(256, 256)
    judge.bands = torch.from_numpy(_mel_bands())
    return judge.eval()


def test_the_installed_weights_are_those_of_the_release():
    pytest.importorskip("resemblyzer", reason="resemblyzer is not installed", exc_type=ImportError)
    from openmimo.demo.audio.judge import _installed_weights

    assert len(hashlib.sha256(_installed_weights().read_bytes()).hexdigest()) == 64
    SpeakerJudge()
