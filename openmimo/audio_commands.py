"""`openmimo audio`: files to codes and back, transcription, speech, spoken conversations, speech corpora, training.

    openmimo audio COMMAND [ARGUMENTS]

Imports torch only after parsing the arguments.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from openmimo.arguments import UsageError, asks_for_help, parse
from openmimo.core.errors import ConfigError, DataError, UserError
from openmimo.core.files import cache_folder
from openmimo.data.audio.codes import Codes, load_codes, save_codes
from openmimo.data.audio.config import CorpusConfig
from openmimo.data.audio.corpus import ENDINGS, Split, write_corpus
from openmimo.data.audio.files import FORMATS, MAX_SECONDS, audio_writer, format_of, pcm_bytes, read_audio
from openmimo.data.audio.tasks import write_tasks
from openmimo.short_help import short_help

DEMO_FOLDER = Path("runs/audio")
DEMO_TOKENIZER = str(DEMO_FOLDER / "decoder" / "model")
DEMO_MODEL = str(DEMO_FOLDER / "language" / "model")
_RAW = "-"
_CHUNK_FRAMES = 4  # codes that a stream decodes at once: one patch of the language model


@dataclass(frozen=True)
class Command:
    """One command of `openmimo audio`.

    Attributes:
        help: One line.
        run: Runs it with the arguments after its name.
    """

    help: str
    run: Callable[[list[str]], None]


@dataclass(frozen=True)
class RecipeCommand:
    """One command of `openmimo audio` with a recipe and overrides.

    Attributes:
        name: The command.
        help: One line.
        config: `module:Class` of its config.
        function: `module:name` of the function that runs a config.
        recipe: The recipe if none is named.
    """

    name: str
    help: str
    config: str
    function: str
    recipe: str


def run(arguments: list[str], run_recipe: Callable[[RecipeCommand, list[str]], None]) -> None:
    """Runs `openmimo audio`.

    Args:
        arguments: The words after `audio`.
        run_recipe: Runs a command with a recipe with the words after its name.

    Raises:
        UserError: An argument, file or model is not usable.
    """
    if not arguments or arguments[0] in ("-h", "--help", "--help-all", "help"):
        print(_overview())
        sys.exit(0 if arguments else 2)
    if arguments[0] not in COMMANDS:
        raise UsageError(f"openmimo audio has no command {arguments[0]!r}. Commands: {', '.join(COMMANDS)}.")
    command = COMMANDS[arguments[0]]
    if isinstance(command, RecipeCommand):
        run_recipe(command, arguments[1:])
    else:
        command.run(arguments[1:])


def _overview() -> str:
    lines = [f"  {name:<12}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: openmimo audio COMMAND [ARGUMENTS]\n",
            *lines,
            "",
            "A model of your own, in about eleven minutes on two cores:   openmimo audio demo",
            f"encode and decode then use {DEMO_TOKENIZER}, the other commands {DEMO_MODEL}:",
            "  openmimo audio transcribe hello.wav",
            '  openmimo audio speak "extension four two is activated" reply.wav',
            '  openmimo audio speak "you have two new messages" - | aplay -f S16_LE -r 24000',
            "  openmimo audio encode hello.wav hello.codes; openmimo audio decode hello.codes again.wav --codebooks 2",
            "",
            "openmimo audio COMMAND --help explains the options of a command.",
        ]
    )


def _options(options_type: type, arguments: list[str], usage: str, main: Sequence[str]) -> Any:
    """Parses the options of a command, or prints its short help, which explains the options `main`."""
    if asks_for_help(arguments):
        print(short_help(options_type, usage=f"openmimo audio {usage} [OPTIONS]", main=main))
        sys.exit(0)
    return parse(options_type, arguments, f"openmimo audio {usage.split()[0]}")


# --- codes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodeOptions:
    """Encode a recording as the discrete codes of an audio tokenizer, 25 frames a second.

    Attributes:
        source: An audio file: wav, flac, ogg, mp3 and others; any sample rate and number of channels.
        destination: A file for the codes (safetensors): a new one, or one of codes, which is replaced.
        tokenizer: Folder of an audio tokenizer (default: that of the demo).
        codebooks: Number of codebooks to keep; fewer means fewer bits and less quality (default: all).
        max_seconds: Longest recording that is accepted.
        device: auto (an accelerator if there is one), cpu, or a torch device.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")]
    tokenizer: str = DEMO_TOKENIZER
    codebooks: int | None = None
    max_seconds: float = MAX_SECONDS
    device: str = "auto"


def _encode(arguments: list[str]) -> None:
    main = ("source", "destination", "tokenizer", "codebooks", "max_seconds", "device")
    options = _options(EncodeOptions, arguments, "encode SOURCE DESTINATION", main)
    _check_codes_destination(Path(options.destination))
    recording = read_audio(options.source, max_seconds=options.max_seconds)
    tokenizer = _tokenizer(options.tokenizer, options.device)
    import torch

    codes_FQ = tokenizer.encode(torch.from_numpy(recording.samples_S), options.codebooks).cpu().numpy()
    save_codes(Path(options.destination), Codes(codes_FQ, len(recording.samples_S)))
    sizes = tokenizer.config.codebook_sizes[: codes_FQ.shape[1]]
    bits = tokenizer.config.frames_per_second * sum(float(np.log2(size)) for size in sizes)
    note = f" ({recording.note})" if recording.note else ""
    print(
        f"{options.destination}: {len(codes_FQ):,} frames of {codes_FQ.shape[1]} codes for {recording.seconds:.2f} s "
        f"of sound, {bits / 1000:.2f} kbit/s{note}"
    )


@dataclass(frozen=True)
class DecodeOptions:
    """Decode a file of codes to sound.

    Attributes:
        source: A file of codes that `openmimo audio encode` wrote.
        destination: An audio file (wav, flac, ogg or mp3 by its ending), or - for raw signed 16-bit samples on standard
            output, which are written as they are decoded.
        tokenizer: Folder of the audio tokenizer that made the codes (default: that of the demo).
        codebooks: Number of codebooks to use (default: all in the file).
        device: auto (an accelerator if there is one), cpu, or a torch device.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")]
    tokenizer: str = DEMO_TOKENIZER
    codebooks: int | None = None
    device: str = "auto"


def _decode(arguments: list[str]) -> None:
    main = ("source", "destination", "tokenizer", "codebooks", "device")
    options = _options(DecodeOptions, arguments, "decode SOURCE DESTINATION", main)
    _check_destination(options.destination, options.source)
    codes = load_codes(Path(options.source)).first(options.codebooks)
    tokenizer = _tokenizer(options.tokenizer, options.device)
    started = time.perf_counter()
    samples = _write(options.destination, _decoded(tokenizer, codes), tokenizer.config.sample_rate)
    if options.destination != _RAW:
        _say_speed(options.destination, samples / tokenizer.config.sample_rate, time.perf_counter() - started)


def _decoded(tokenizer: Any, codes: Codes) -> Iterator[np.ndarray]:
    """The waveform of codes: part by part where the tokenizer can stream, cut to the length of the recording."""
    import torch

    left = codes.num_samples
    for part in _parts(tokenizer, torch.from_numpy(codes.codes_FQ).long()):
        yield part[:left]
        left -= min(left, len(part))


def _parts(tokenizer: Any, codes_FQ: Any) -> Iterator[np.ndarray]:
    config = tokenizer.config
    if (
        config.decoder_norm == "sequence"
        or config.decoder.right_positions != 0
        or config.vocoder.right_positions is None
    ):
        yield tokenizer.decode(codes_FQ).cpu().numpy()
        return
    stream = tokenizer.stream()
    for start in range(0, len(codes_FQ), _CHUNK_FRAMES):
        yield stream.push(codes_FQ[start : start + _CHUNK_FRAMES]).cpu().numpy()
    yield stream.finish().cpu().numpy()


def _tokenizer(path: str, device: str) -> Any:
    _require_demo(path, DEMO_TOKENIZER, "--tokenizer")
    from openmimo.model.audio.tokenizer import load_audio_tokenizer

    return load_audio_tokenizer(path, device=device)


def _require_demo(path: str, demo: str, option: str) -> None:
    if path == demo and not Path(path).exists():
        raise ConfigError(
            f"there is no {path} yet. `openmimo audio demo` trains it in minutes on a CPU; {option} FOLDER names "
            "another."
        )


def _check_destination(destination: str, source: str | None = None) -> None:
    """Refuses the source itself, and a name whose ending is no format, before minutes of work."""
    if destination != _RAW:
        format_of(Path(destination))
        if source is not None and Path(destination).resolve() == Path(source).resolve():
            raise ConfigError(f"{destination} is the source, which would be lost. Name another destination.")


def _check_codes_destination(path: Path) -> None:
    """Refuses to replace a file that has no codes, such as a recording."""
    if path.suffix.lower() in (*ENDINGS, *FORMATS):
        raise ConfigError(
            f"{path} has the ending of a recording, and the destination is a file of codes. Name a file such as "
            f"{path.with_suffix('.codes')}; each call of encode takes one recording."
        )
    if path.exists():
        try:
            load_codes(path)
        except DataError as error:
            raise ConfigError(f"{path} exists and is no file of codes, so it is kept. Name another file.") from error


def _write(destination: str, parts: Iterable[np.ndarray], sample_rate: int) -> int:
    """Writes parts of a waveform as they come; returns the number of samples."""
    samples = 0
    if destination == _RAW:
        for part in parts:
            sys.stdout.buffer.write(pcm_bytes(part))
            sys.stdout.buffer.flush()
            samples += len(part)
        _check_samples(samples)
        return samples
    with audio_writer(destination, sample_rate) as write:
        for part in parts:
            write(part)
            samples += len(part)
        _check_samples(samples)
    return samples


def _check_samples(samples: int) -> None:
    if not samples:
        raise DataError("the model said nothing; another text or --seed may give speech.")


def _say_speed(destination: str, seconds: float, wall_seconds: float) -> None:
    print(
        f"{destination}: {seconds:.2f} s of sound in {wall_seconds:.2f} s (real-time "
        f"factor {wall_seconds / seconds:.2f})"
    )


# --- the language model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and its limits.

    Attributes:
        model: Folder of an audio language model (default: that of the demo).
        tokenizer: Folder of its audio tokenizer (default: the folder "codec" in the model's folder).
        max_tokens: The most text tokens and patches of sound (0.16 s each) of a reply.
        max_seconds: Longest recording that is accepted.
        device: auto (an accelerator if there is one), cpu, or a torch device.
    """

    model: str = DEMO_MODEL
    tokenizer: str | None = None
    max_tokens: int = 256
    max_seconds: float = 120.0
    device: str = "auto"


@dataclass(frozen=True)
class SampledModelOptions(ModelOptions):
    """Which model, its limits, and how it draws.

    Attributes:
        temperature: Temperature of the text (0: the most likely).
        audio_temperature: Temperature of the codes of sound.
        seed: Seed of the draws.
    """

    temperature: float = 0.0
    audio_temperature: float = 0.9
    seed: int = 0


_HIGHER = "give a higher --max-tokens."
_MODEL = ("model", "tokenizer", "max_tokens", "device")
_SAMPLED_MODEL = (*_MODEL, "temperature", "audio_temperature", "seed")


def _engine(options: ModelOptions) -> Any:
    _require_demo(options.model, DEMO_MODEL, "--model")
    from openmimo.engine.audio.engine import AudioEngine

    return AudioEngine(options.model, options.tokenizer, options.device)


def _params(options: SampledModelOptions) -> Any:
    from openmimo.engine.audio.engine import AudioParams

    return AudioParams(
        max_tokens=options.max_tokens,
        text_temperature=options.temperature,
        audio_temperature=options.audio_temperature,
        seed=options.seed,
    )


class _Reply:
    """The events of a reply.

    Attributes:
        is_cut: Whether the limit of tokens ended it; known after the last event.
    """

    def __init__(self, events: Iterable[Any]):
        self.is_cut = False
        self._events = events

    def __iter__(self) -> Iterator[Any]:
        for event in self._events:
            self.is_cut = event.finish_reason == "length"
            yield event


@dataclass(frozen=True)
class TranscribeOptions:
    """Print the words of recordings.

    Attributes:
        sources: Audio files of any format and sample rate. With several, each line begins with the name of its file.
    """

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE ...")]
    settings: Annotated[ModelOptions, tyro.conf.arg(name="")] = ModelOptions()


def _transcribe(arguments: list[str]) -> None:
    """Writes the most likely text, so nothing is drawn."""
    options = _options(TranscribeOptions, arguments, "transcribe SOURCE ...", ("sources", *_MODEL, "max_seconds"))
    settings = options.settings
    if not options.sources:
        raise UsageError("openmimo audio transcribe needs at least one audio file.")
    recordings = {source: read_audio(source, max_seconds=settings.max_seconds) for source in options.sources}
    from openmimo.engine.audio.engine import AudioParams

    engine, cut = _engine(settings), []
    params = AudioParams(max_tokens=settings.max_tokens)
    for source, recording in recordings.items():
        if recording.note:
            print(f"{source}: {recording.note}", file=sys.stderr)
        reply = _Reply(engine.transcription(recording.samples_S, recording.sample_rate, params))
        text = "".join(event.text or "" for event in reply).strip()
        print(f"{source}: {text}" if len(recordings) > 1 else text, flush=True)
        if reply.is_cut:
            cut.append(source)
    if cut:
        raise DataError(f"the text of {', '.join(cut)} is cut off after {settings.max_tokens} tokens; {_HIGHER}")


@dataclass(frozen=True)
class SpeakOptions:
    """Speak a text.

    Attributes:
        text: The text.
        destination: An audio file (wav, flac, ogg or mp3 by its ending), or - for raw signed 16-bit samples on standard
            output, which are written as they are generated.
        instruction: How to speak, in words ("slowly, in a whisper"), for models that were trained with such.
        voice: A recording whose voice the model takes, for models that were trained with such.
    """

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")]
    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")]
    instruction: str | None = None
    voice: str | None = None
    settings: Annotated[SampledModelOptions, tyro.conf.arg(name="")] = SampledModelOptions()


def _speak(arguments: list[str]) -> None:
    main = ("text", "destination", "instruction", "voice", *_SAMPLED_MODEL)
    options = _options(SpeakOptions, arguments, "speak TEXT DESTINATION", main)
    settings = options.settings
    _check_destination(options.destination, options.voice)
    voice = None if options.voice is None else read_audio(options.voice, max_seconds=settings.max_seconds).samples_S
    engine = _engine(settings)
    started = time.perf_counter()
    reply = _Reply(engine.speech(options.text, options.instruction, voice, params=_params(settings)))
    parts = (event.waveform for event in reply if event.waveform is not None)
    samples = _write(options.destination, parts, engine.sample_rate)
    if options.destination != _RAW:
        _say_speed(options.destination, samples / engine.sample_rate, time.perf_counter() - started)
    if reply.is_cut:
        raise DataError(f"the speech is cut off after {settings.max_tokens} tokens and patches; {_HIGHER}")


@dataclass(frozen=True)
class ChatOptions:
    """Talk with a model: type a text, or the name of an audio file that it hears; Ctrl-D ends.

    Attributes:
        folder: A folder for the spoken replies, reply-1.wav and so on, after those that are there (default: replies
            are text only).
        system: The system message.
    """

    folder: str | None = None
    system: str | None = None
    settings: Annotated[SampledModelOptions, tyro.conf.arg(name="")] = SampledModelOptions()


def _chat(arguments: list[str]) -> None:
    options = _options(ChatOptions, arguments, "chat", ("folder", "system", *_SAMPLED_MODEL))
    engine = _engine(options.settings)
    params = replace(_params(options.settings), output="interleaved" if options.folder else "text")
    messages: list[dict[str, Any]] = [{"role": "system", "content": options.system}] if options.system else []
    first = _next_reply(Path(options.folder)) if options.folder else 1
    for number, line in enumerate(_lines(), first):
        try:
            messages.append({"role": "user", "content": [_said(line, options.settings.max_seconds)]})
            text, waveform = _reply(engine.chat(messages, params))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            del messages[-1:]
            continue
        messages.append({"role": "assistant", "thinking": False, "content": [{"type": "text", "text": text}]})
        if options.folder and len(waveform):
            path = Path(options.folder) / f"reply-{number}.wav"
            _write(str(path), [waveform], engine.sample_rate)
            print(path)


def _next_reply(folder: Path) -> int:
    """The number after the last reply in a folder."""
    numbers = [path.stem.removeprefix("reply-") for path in folder.glob("reply-*.wav")]
    return max((int(number) for number in numbers if number.isdecimal()), default=0) + 1


def _lines() -> Iterator[str]:
    """Non-empty lines of standard input, after a prompt if it is a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _said(line: str, max_seconds: float) -> dict[str, Any]:
    if Path(line).suffix.lower() not in FORMATS:
        return {"type": "text", "text": line}
    recording = read_audio(line, max_seconds=max_seconds)
    return {"type": "audio", "audio": {"waveform": recording.samples_S, "sample_rate": recording.sample_rate}}


def _reply(events: Iterable[Any]) -> tuple[str, np.ndarray]:
    """Prints the text of a reply as it comes, and returns it with the waveform."""
    text, parts = "", [np.zeros(0, np.float32)]
    reply = _Reply(events)
    for event in reply:
        if event.text:
            print(event.text, end="", flush=True)
            text += event.text
        if event.waveform is not None:
            parts.append(event.waveform)
    print()
    if reply.is_cut:
        print(f"warning: the reply is cut off; {_HIGHER}", file=sys.stderr)
    return text, np.concatenate(parts)


# --- data and training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataOptions:
    """Write a speech corpus for training: files of 24 kHz, clips.jsonl, train.jsonl and heldout.jsonl.

    Each task of fine-tuning (transcription, speech, understanding, dialogue) has rows in a folder of its name.

    Attributes:
        folder: The folder that is written.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")] = str(DEMO_FOLDER / "corpus")
    corpus: Annotated[CorpusConfig, tyro.conf.arg(name="")] = CorpusConfig()


def _data(arguments: list[str]) -> None:
    main = ("folder", "sounds", "transcripts", "composed", "held_out", "max_seconds", "seed")
    options = _options(DataOptions, arguments, "data [FOLDER]", main)
    corpus = write_corpus(Path(options.folder), options.corpus, cache_folder() / "audio")
    for note in corpus.notes:
        print(f"left out: {note}", file=sys.stderr)
    splits: tuple[Split, ...] = ("train", "heldout", "other")
    for split in splits:
        for kind, clips in (("recordings", corpus.select(split, composed=False)),
                            ("composed sentences", corpus.select(split, composed=True))):  # fmt: skip
            if clips:
                with_text = sum(clip.text is not None for clip in clips)
                minutes = sum(clip.seconds for clip in clips) / 60
                print(f"{split:<8} {len(clips):>5} {kind}, {minutes:.1f} minutes, {with_text} with text")
    for task, rows in write_tasks(corpus, options.corpus).items():
        counts = " and ".join(f"{len(rows[split]):,} of {split}" for split in rows)
        print(f"rows for {task}: {counts} in {corpus.folder / task}")
    print(f"licenses: {corpus.folder / 'LICENSES.txt'}")


_TRAINED = (
    RecipeCommand(
        "demo",
        "train a tokenizer and a model on real speech, measure them; writes report.html",
        "openmimo.demo.audio.config:AudioDemoConfig",
        "openmimo.demo.audio.story:run",
        "audio_demo:demo",
    ),
    RecipeCommand(
        "tokenizer",
        "train an audio tokenizer on a corpus",
        "openmimo.train.audio.tokenizer.config:AudioTokenizerTrainConfig",
        "openmimo.train.audio.tokenizer.run:train_tokenizer",
        "audio_tokenizer:tiny",
    ),
    RecipeCommand(
        "language",
        "train an audio language model on rows of conversations or documents",
        "openmimo.train.audio.config:AudioTrainConfig",
        "openmimo.train.audio.run:train_audio",
        "audio_demo:language",
    ),
)
COMMANDS: dict[str, Command | RecipeCommand] = {
    **{command.name: command for command in _TRAINED},
    "data": Command("write a speech corpus: Debian's telephone prompts, or recordings of your own", _data),
    "encode": Command("encode a recording as codes", _encode),
    "decode": Command("decode codes to sound", _decode),
    "transcribe": Command("print the words of recordings", _transcribe),
    "speak": Command("speak a text", _speak),
    "chat": Command("talk with a model: text or recordings in, text or speech out", _chat),
}
