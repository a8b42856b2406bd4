"""Configs of the training of audio language models, without torch."""

from dataclasses import KW_ONLY, dataclass

from openmimo.core.errors import ConfigError
from openmimo.core.fields import NonNegativeFloat, check_fields, renamed_keys
from openmimo.data.config import SourceConfig
from openmimo.train.config import Phase, TokenizerConfig, TrainConfig, check_path

ROWS = "audio_rows"
"""The name of the one kind of source: a file of rows, in `options["path"]`."""
CODEBOOK_WEIGHTS = (12.0, 8.0, 6.0, 4.0, 2.0, 2.0, 1.0, 1.0)
"""Weights of the losses of eight codebooks (arXiv 2512.23808, section 3.3)."""


def audio_rows(path: str, *, test_path: str | None = None, weight: float = 1.0) -> SourceConfig:
    """Return a source of a mixture.

    Args:
        path: The rows that are trained on.
        test_path: Rows that are held out (None: a share of `path`, see `MixtureConfig.validation_fraction`).
        weight: Share of the documents, relative to the other weights.
    """
    return SourceConfig(ROWS, weight, {"path": path} | ({} if test_path is None else {"test_path": test_path}))


@renamed_keys()
@dataclass(frozen=True)
class AudioPhase(Phase):
    """One phase of the training of an audio model.

    Attributes:
        text_weight: Weight of the loss of the text channel.
        codebook_weights: Weight of the loss of each codebook; all 0: the patch decoder is not trained.
        empty_weight: Weight of a patch in the loss of the text channel, where a text token has 1.
        encoder_learning_rate: Peak learning rate of the patch encoder (None: `learning_rate`).
        decoder_learning_rate: Peak learning rate of the patch decoder (None: `learning_rate`).
    """

    _: KW_ONLY
    text_weight: NonNegativeFloat = 100.0
    codebook_weights: tuple[NonNegativeFloat, ...] = CODEBOOK_WEIGHTS
    empty_weight: NonNegativeFloat = 0.01
    encoder_learning_rate: NonNegativeFloat | None = None
    decoder_learning_rate: NonNegativeFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"phase {self.name!r}"
        check_fields(self, where)
        if self.text_weight + sum(self.codebook_weights) == 0.0:
            raise ConfigError(f"{where}: all weights of the loss are 0.")
        if self.mtp_heads is not None or self.mtp_weight != Phase.mtp_weight:
            raise ConfigError(f"{where} has mtp_heads or mtp_weight, but audio models have no MTP heads; leave it out.")
        if self.learning_rate == 0.0 and (self.encoder_learning_rate or self.decoder_learning_rate):
            raise ConfigError(f"{where}: the learning rates of the parts are relative to learning_rate, which is 0.")
        for source in self.mixture.sources:
            unknown = set(source.options) - {"path", "test_path"}
            if source.max_megabytes:
                raise ConfigError(f"{where}: max_megabytes has no effect on {ROWS!r}; leave it out.")
            if source.name != ROWS or unknown or not isinstance(source.options.get("path"), str):
                raise ConfigError(
                    f"{where} has the source {source.name!r} with options {sorted(source.options)}; an audio model is "
                    f"trained on sources {ROWS!r} with the options path and test_path."
                )


@renamed_keys()
@dataclass(frozen=True)
class AudioTrainConfig(TrainConfig):
    """A complete run: pre-training, fine-tuning, or both.

    Attributes:
        stages: The phases in order.
        codec: Folder of the audio tokenizer.
        model: A preset of `openmimo/model/audio/language_config.py`, or the path of a config.json (None: `tiny_audio`,
            or the model of `init_from`). Its codebooks become those of the audio tokenizer.
        init_from: Folder of an audio model, or of a text model that becomes the backbone (None: random weights).
        tokenizer: Source of the text tokenizer.
    """

    stages: tuple[AudioPhase, ...]
    codec: str
    model: str | None = None
    init_from: str | None = None
    _: KW_ONLY
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self) -> None:
        check_fields(self, "the run")
        for name in ("run_folder", "codec", "init_from"):
            check_path(getattr(self, name), name)
        if not self.stages:
            raise ConfigError("the run has no stages.")
        names = [phase.name for phase in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"two stages share a name: {', '.join(names)}.")
        if self.quantization != "none":
            raise ConfigError("audio models are not trained with quantization; leave it out.")
        if any(size > 1 for size in self.parallel.sizes.values()):
            raise ConfigError("audio models are trained by one process; leave parallel out.")
        unused = {
            "expert_trace": self.expert_trace,
            "expert_step": self.expert_step.is_used,
            "z_weight": self.z_weight > 0,
            "balance_over": self.balance_over != "sequence",
            "loader_workers": self.loader_workers,
            "tokenizer.train_megabytes": self.tokenizer.train_megabytes != TokenizerConfig.train_megabytes,
        }
        for name, is_set in unused.items():
            if is_set:
                raise ConfigError(f"{name} has no effect on the training of an audio model; leave it out.")
