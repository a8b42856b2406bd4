"""A damaged checkpoint folder gives a working model, or one paragraph that names the file."""

import resource
import signal

import pytest
import torch
from damaged_checkpoints import apply, damages, save_sound_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmimo.core.errors import UserError
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import load_model

_SECONDS_OF_A_HANG = 120


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return save_sound_checkpoint(tmp_path_factory.mktemp("sound") / "m")


@settings(
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_a_damaged_folder_works_or_is_refused_by_name(sound, data):
    damage = data.draw(damages(sound))
    folder = apply(damage, sound, sound.parent / "damaged")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(_SECONDS_OF_A_HANG)
    try:
        tokenizer = Tokenizer.load(folder)
        model = load_model(folder)
        with torch.no_grad():
            logits = model.logits(torch.tensor(tokenizer.encode("The fox")))
        assert logits.shape[1] == model.config.vocab_size
        assert tokenizer.decode(tokenizer.encode("The fox")) == "The fox"
    except UserError as error:
        named = (damage.file, damage.file.removesuffix(".index.json"), "config.json", folder.name)
        assert any(name in str(error) for name in named), f"{damage}: {error}"
        assert "\n\n" not in str(error)
        assert len(str(error)) < 20_000
    finally:
        signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000, f"{damage}: {grown} KB more"


def test_the_sound_folder_works(sound):
    assert load_model(sound).companions.files["generation_config.json"]
    assert len(list(sound.glob("*.safetensors"))) >= 3
