"""A small audio language model with random weights and its audio tokenizer, for tests."""

import torch

from openmimo.data.tokenizer import Tokenizer
from openmimo.model.audio.config import tiny_codec
from openmimo.model.audio.language import AudioLanguageModel, save_audio_model
from openmimo.model.audio.language_config import audio_model_config, with_codebooks
from openmimo.model.audio.sequence import ALL_SPECIAL_TOKENS
from openmimo.model.audio.tokenizer import AudioTokenizer, save_audio_tokenizer


def save_tiny_audio_checkpoint(folder):
    """Writes a folder that `openmimo serve` loads."""
    codec_config = tiny_codec()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = AudioTokenizer(codec_config)
    save_audio_tokenizer(codec, folder.parent / "codec")
    config = with_codebooks(audio_model_config("tiny_audio"), codec_config.codebook_sizes)
    model = AudioLanguageModel(config)
    model.initialize(torch.Generator().manual_seed(0))
    tokenizer = Tokenizer.train(["hello world, what a fine day it is"] * 5, 300, ALL_SPECIAL_TOKENS)
    save_audio_model(model, folder, tokenizer=tokenizer, codec=folder.parent / "codec")
