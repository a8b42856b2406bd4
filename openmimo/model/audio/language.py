"""The audio language model: patch encoder, backbone, patch decoder (MiMo-Audio, arXiv 2512.23808, section 3.2).

A patch is a few audio frames of several codebooks. The patch encoder sums the embeddings of a frame's codes, runs a
small bidirectional transformer over the frames of the patch, and projects them to one input of the backbone. The patch
decoder turns a state of the backbone to the next patch: a small causal transformer, in which codebook q of frame f is
predicted at step f + delays[q], from the codes of the steps before.

    step        0     1     2     3     4   ...            (4 frames, delays 0, 1, 2)
    codebook 0  f0    f1    f2    f3
    codebook 1        f0    f1    f2    f3
    codebook 2              f0    f1    f2    f3

P patches, H frames of a patch, Q codebooks, S steps of the patch decoder, T positions, D model dim, L local dim.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openmimo.core.errors import CheckpointError
from openmimo.core.files import file_in_folder, new_folder_atomic, read_json, recover_folder, require_folder
from openmimo.data.tokenizer import Tokenizer
from openmimo.data.tokenizer_files import read_companions
from openmimo.model.audio.context import BidirectionalContext, StepContext
from openmimo.model.audio.language_config import AudioModelConfig, audio_config_from_hf, audio_keys
from openmimo.model.audio.sequence import AudioSequence, delayed, undelayed
from openmimo.model.backbone import Backbone, Hidden
from openmimo.model.context import AttentionContext, PackedContext
from openmimo.model.heads import Head
from openmimo.model.hf import CODEC_FOLDER, check_replaceable, filled_model, write_model
from openmimo.model.hf_files import CheckpointReader
from openmimo.model.layers import Embedding, Linear
from openmimo.model.mimo import MiMo

__all__ = ["AudioLanguageModel", "AudioModelConfig", "load_audio_model", "save_audio_model"]
ChooseCode = Callable[[torch.Tensor, int, int], int]


class AudioLanguageModel(MiMo):
    """A text model with a patch encoder and a patch decoder. Text alone is computed as in `MiMo`.

    Parameter names are those of the published checkpoint.

    Args:
        config: The geometry.
    """

    def __init__(self, config: AudioModelConfig):
        super().__init__(config.backbone)
        self._audio = config
        encoder, decoder, D = config.encoder, config.decoder, config.backbone.hidden_size
        self.local_transformer = Backbone(config.local_model(decoder))
        self.input_local_transformer = Backbone(config.local_model(encoder))
        self.local_transformer_lm_heads = nn.ModuleList(Head(decoder.dim, size) for size in config.vocab_sizes)
        self.speech_embeddings = nn.ModuleList(Embedding(size, encoder.dim) for size in config.vocab_sizes)
        self.speech_embeddings_to_local: Linear | None = None
        if encoder.dim != decoder.dim:
            self.speech_embeddings_to_local = Linear(encoder.dim, decoder.dim, bias=False)
        self.speech_group_downcast = Linear(encoder.dim * config.patch_frames, D, bias=False)
        self.hidden_states_downcast = Linear(D, decoder.dim, bias=False)

    @property
    def audio(self) -> AudioModelConfig:
        """The geometry, with the backbone as it is now."""
        return replace(self._audio, backbone=self.config)

    def config_keys(self, values: dict[str, Any]) -> dict[str, Any]:
        """As `MiMo.config_keys`: add the keys of the patches."""
        return values | audio_keys(self.audio)

    def states(self, sequence: AudioSequence, context: AttentionContext) -> Hidden:
        """Run the backbone over packed text and patches."""
        return self.model(self.embed(sequence), context)

    def embed(self, sequence: AudioSequence) -> torch.Tensor:
        """Return the inputs of the backbone, [T, D]."""
        is_patch_T = sequence.is_patch_T
        x_TD = self.model.embed_tokens(sequence.text_ids_T.masked_fill(is_patch_T, 0), self.compute_dtype)
        if not bool(is_patch_T.any()):
            return x_TD
        patches_PD = self.embed_patches(sequence.codes_THQ[is_patch_T])
        return x_TD.index_copy(0, is_patch_T.nonzero()[:, 0], patches_PD)

    def embed_patches(self, codes_PHQ: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the backbone for patches, [P, D]."""
        P, H, _ = codes_PHQ.shape
        x_TL = self._sum_of_codes(codes_PHQ).flatten(0, 1)
        kind = BidirectionalContext if self._audio.bidirectional_encoder else PackedContext
        states = self.input_local_transformer(x_TL, kind((H,) * P, device=x_TL.device))
        return self.speech_group_downcast(states.post_norm_TD.view(P, -1))

    def local_logits(self, states_PD: torch.Tensor, codes_PHQ: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits [P, H, codes] of each codebook, given the codes of the steps before.

        Args:
            states_PD: States of the backbone before each patch.
            codes_PHQ: The patches.
        """
        states_PHL = self.local_states(states_PD, codes_PHQ)
        return [head(states_PHL[number]) for number, head in enumerate(self.local_transformer_lm_heads)]

    def local_states(self, states_PD: torch.Tensor, codes_PHQ: torch.Tensor) -> list[torch.Tensor]:
        """Return the inputs [P, H, L] of the head of each codebook; see `local_logits`."""
        config = self._audio
        P, H, _ = codes_PHQ.shape
        codes_PSQ = delayed(codes_PHQ, config.delays, config.empty_ids)
        inputs_PSL = torch.cat(
            [self.hidden_states_downcast(states_PD)[:, None], self._local_inputs(codes_PSQ[:, :-1])], dim=1
        )
        context = PackedContext((config.local_steps,) * P, device=states_PD.device)
        states_TL = self.local_transformer(inputs_PSL.flatten(0, 1), context).post_norm_TD
        states_PSL = states_TL.view(P, config.local_steps, -1)
        return [states_PSL[:, delay : delay + H] for delay in config.delays]

    def generate_patch(self, state_D: torch.Tensor, context: StepContext, choose: ChooseCode) -> torch.Tensor:
        """Generate the patch after a state, int64 [H, Q].

        Args:
            state_D: State of the backbone.
            context: A context of `local_steps` steps. It may be used again.
            choose: Returns a code from logits [codes], the number of the codebook and the frame. The logit of "no
                code" is -inf.
        """
        config = self._audio
        H = config.patch_frames
        codes_SQ = torch.tensor(config.empty_ids, device=state_D.device).repeat(config.local_steps, 1)
        x_1L = self.hidden_states_downcast(state_D[None])
        context.restart()
        for step in range(config.local_steps):
            state_1L = self.local_transformer(x_1L, context.at(step)).post_norm_TD
            for number, delay in enumerate(config.delays):
                if delay <= step < delay + H:
                    logits_V = self.local_transformer_lm_heads[number](state_1L)[0]
                    logits_V[config.empty_ids[number]] = -torch.inf
                    codes_SQ[step, number] = choose(logits_V, number, step - delay)
            x_1L = self._local_inputs(codes_SQ[None, step : step + 1])[0]
        return undelayed(codes_SQ[None], config.delays)[0]

    def _local_inputs(self, codes_PSQ: torch.Tensor) -> torch.Tensor:
        """Return the inputs [P, S, L] of the patch decoder for delayed codes."""
        x_PSL = self._sum_of_codes(codes_PSQ)
        return x_PSL if self.speech_embeddings_to_local is None else self.speech_embeddings_to_local(x_PSL)

    def _sum_of_codes(self, codes_PSQ: torch.Tensor) -> torch.Tensor:
        """Return the sum of the embeddings of a frame's codes, [P, S, encoder dim]; "no code" adds nothing."""
        total = None
        for number, embedding in enumerate(self.speech_embeddings):
            codes_PS = codes_PSQ[..., number]
            x = embedding(codes_PS, self.compute_dtype)
            x = x.masked_fill((codes_PS == self._audio.empty_ids[number])[..., None], 0.0)
            total = x if total is None else total + x
        assert total is not None
        return total


def load_audio_model(path: str | Path, dtype: str = "float32", device: str = "cpu") -> AudioLanguageModel:
    """Load a published or saved folder.

    Args:
        path: The folder.
        dtype: float32, bfloat16, float16 or float64.
        device: A torch device, or "auto".

    Raises:
        CheckpointError: Lists all missing, unexpected, misshaped and unreadable tensors, before any is read.
        ConfigError: config.json is not valid, or describes no audio language model.
    """
    folder = Path(path)
    recover_folder(folder)
    require_folder(folder)
    file = file_in_folder(folder, "config.json")
    if file is None:
        raise CheckpointError(f"{folder} holds no config.json; a checkpoint is a folder with config.json and weights.")
    config = audio_config_from_hf(read_json(file), where=str(file))
    companions = read_companions(folder)
    with torch.device("meta"):
        model = AudioLanguageModel(config)
    model.companions = companions
    return filled_model(model, CheckpointReader(folder), dtype=dtype, device=device)


def save_audio_model(
    model: AudioLanguageModel,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    codec: str | Path | None = None,
) -> None:
    """Write a folder that `load_audio_model` reads. The write is atomic.

    Args:
        model: The model.
        path: The folder. An existing model is replaced.
        tokenizer: Source of the tokenizer files (None: those with which the model was loaded).
        codec: Folder of the audio tokenizer, which is copied to `path`/codec (None: the one that is there is kept).

    Raises:
        CheckpointError: `path` is a file, or a folder with files that are no audio model.
    """
    path = Path(path)
    recover_folder(path)
    kept = path / CODEC_FOLDER if codec is None else Path(codec)
    check_replaceable(path)
    if codec is not None and not kept.is_dir():
        raise CheckpointError(f"there is no folder {kept} of an audio tokenizer.")
    with new_folder_atomic(path) as folder:
        write_model(model, folder, tokenizer=tokenizer)
        if kept.is_dir():
            shutil.copytree(kept, folder / CODEC_FOLDER)
