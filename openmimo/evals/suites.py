"""The suites of tasks: what each measures, at which lengths, and which tasks form a mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One line of a suite.

    Attributes:
        label: Name in tables.
        task: Name of the task.
        options: Settings of the task.
    """

    label: str
    task: str
    options: Mapping[str, int | float | str | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        entries: The tasks.
        lengths: Default lengths.
        means: Labels whose scores form a mean, by its name.
    """

    entries: tuple[Entry, ...]
    lengths: tuple[int, ...]
    means: Mapping[str, tuple[str, ...]]


def _entries(*names: str) -> tuple[Entry, ...]:
    return tuple(Entry(name, name) for name in names)


_NIAH_MULTI = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery")
_RULER = ("niah_single_1", "niah_single_2", "niah_single_3", *_NIAH_MULTI, "vt", "cwe", "fwe", "qa_1", "qa_2")
_INFINITE_BENCH = ("passkey", "number_string", "kv_retrieval", "math_find", "math_calc", "code_run")
_MRCR = tuple(Entry(f"mrcr_{count}", "mrcr", {"needles": count}) for count in (2, 4, 8))
_NOLIMA = tuple(Entry(f"nolima_{hops}_hop", "nolima", {"hops": hops}) for hops in (1, 2))
_GSM = ("gsm_symbolic", "gsm_medium", "gsm_hard")
_TOKENS = ("needle", "token_multikey", "token_tracking", "token_two_hop")
_LENGTHS = tuple(4096 << power for power in range(6))

SPEECH_SUITE = (
    *_entries("transcription", "synthesis", "speaker_similarity"),
    *(Entry(f"speech_mmlu_{form}", "speech_mmlu", {"form": form}) for form in ("s2s", "s2t", "t2s", "t2t")),
    *_entries("few_shot_speed", "few_shot_denoising"),
)

SUITES = {
    "ruler": Suite(_entries(*_RULER), _LENGTHS, {"NIAH-Multi": _NIAH_MULTI, "RULER": _RULER}),
    "long": Suite(
        (*_entries(*_RULER, *_GSM), *_MRCR, *_NOLIMA, *_entries(*_INFINITE_BENCH, "line_retrieval", "json_recall"),
         *_entries("many_shot")),
        _LENGTHS,
        {
            "NIAH-Multi": _NIAH_MULTI,
            "RULER": _RULER,
            "GSM-Infinite": _GSM,
            "MRCR": tuple(entry.label for entry in _MRCR),
            "NoLiMa": tuple(entry.label for entry in _NOLIMA),
            "InfiniteBench": _INFINITE_BENCH,
        },
    ),
    "tiny": Suite(_entries(*_TOKENS), (64, 128, 256, 512, 1024), {"all": _TOKENS}),
}  # fmt: skip
