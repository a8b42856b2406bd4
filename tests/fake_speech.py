"""A speech model whose replies say what it was given, for tests of the server, the page and the evaluation."""

import threading
import time

import numpy as np

from openmimo.core.errors import UserError
from openmimo.engine.server.backends.speech import (
    ChatWork,
    Clip,
    SpeakWork,
    SpeechBackend,
    SpeechEvent,
    TranscribeWork,
    seconds_of,
)
from openmimo.engine.server.backends.stub import StubBackend

RATE = 16_000
PATCH = 1600  # samples of one event


def tone(seconds, sample_rate=RATE, frequency=440.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * sample_rate)) / sample_rate)).astype("float32")


class FakeSpeech:
    """Writes the length of what it hears, and speaks one patch of a tone for each word.

    Attributes:
        open: Number of replies that have started and have neither ended nor been closed.
        order: The first word of the work, once for each event, in order of the events.
        gate: Events wait while it is not set.
    """

    sample_rate = RATE

    def __init__(self, voices=()):
        self.voices = voices
        self.open = 0
        self.order = []
        self.gate = threading.Event()
        self.gate.set()

    def check(self, work):
        if isinstance(work, SpeakWork) and work.text == "unspeakable":
            raise UserError("the text cannot be spoken.")

    def prompt_counts(self, work):
        return len(_texts(work).split()), int(seconds_of(work) * RATE) // PATCH

    def events(self, work, sampling):
        self.open += 1
        try:
            for event in self._play(work):
                self.gate.wait()
                self.order.append(_texts(work).split(" ")[0])
                yield event
        finally:
            self.open -= 1

    def _play(self, work):
        match work:
            case TranscribeWork():
                yield from _words(f"{work.clip.seconds:.2f} seconds at {work.clip.sample_rate}")
                if work.clip.seconds > 8:  # more than it can write
                    yield SpeechEvent(finish_reason="length")
                    return
            case SpeakWork():
                for word in _words_spoken(work.text):
                    if word == "silence":
                        continue
                    if word == "break":
                        raise UserError("the codec broke.")
                    if word == "cut":
                        yield SpeechEvent(finish_reason="length")
                        return
                    yield SpeechEvent(waveform=tone(PATCH / RATE), num_tokens=1, num_patches=1)
            case ChatWork():
                said = f"{_texts(work)} and {seconds_of(work):.2f} seconds"
                if _texts(work) == "mute":
                    yield from _words("no sound") if work.output == "interleaved" else ()
                    yield SpeechEvent(finish_reason="stop")
                    return
                if work.thinks:
                    yield SpeechEvent(reasoning="Hm.", num_tokens=1)
                for event in _words(said):
                    if work.output != "audio":
                        yield event
                    if work.output != "text":
                        yield SpeechEvent(waveform=tone(PATCH / RATE), num_tokens=1, num_patches=1)
        yield SpeechEvent(finish_reason="stop")


def _words_spoken(text):
    """Yield the words; after "forever" comes one every millisecond until the reply is closed."""
    for word in text.split():
        yield word
        while word == "forever":
            time.sleep(0.001)
            yield word


def _texts(work):
    match work:
        case ChatWork():
            return " ".join(part for message in work.messages for part in message.parts if not isinstance(part, Clip))
        case SpeakWork():
            return work.text
        case TranscribeWork():
            return ""


def _words(text):
    for index, word in enumerate(text.split(" ")):
        yield SpeechEvent(text=word if index == 0 else f" {word}", num_tokens=1)


def speech_backend(voices=(), **options):
    """A backend with a fake model of speech and a stub of text."""
    return SpeechBackend(FakeSpeech(voices), StubBackend(model_name="speaker"), **options)
