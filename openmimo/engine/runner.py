"""Runs the model for a batch of sequences: prompts in bounded passes, then one step after another.

Plain decoding is the case of no drafts: a step feeds each sequence's newest token and whatever drafts it has, decides a
token at every position, and keeps those up to the first that was not drafted.

T packed new tokens, R rows to decide.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from openmimo.engine.cache import KVCache
from openmimo.engine.context import CachedContext, RotaryRows
from openmimo.engine.sampler import Draw, chosen_logprobs, sample
from openmimo.engine.sequence import Sequence
from openmimo.engine.speculative import Drafter, count_accepted
from openmimo.engine.stats import EngineStats
from openmimo.model.mimo import Hidden, MiMo


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a prompt."""

    sequence: Sequence
    start: int
    stop: int


class Runner:
    """A model, and the heads that draft for it (none if `num_drafts` is 0). The sequences hold all that changes.

    prefill_tokens: how many prompt tokens one pass takes at most, which bounds its memory.
    """

    def __init__(self, model: MiMo, *, num_drafts: int, prefill_tokens: int, stats: EngineStats):
        self.model = model
        self.num_drafts = num_drafts
        self.prefill_tokens = prefill_tokens
        self.stats = stats
        self._rotary = RotaryRows(model.device)
        self._drafter = Drafter(model, num_drafts, self._rotary) if num_drafts else None
        self._num_main_layers = len(model.config.layers)
        self._cached_layers = model.config.attention_layers()[: self._num_main_layers + num_drafts]
        self._dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype

    @torch.inference_mode()
    def prefill(self, sequences: list[Sequence]) -> None:
        """Reads the prompts of new sequences and decides the first token of each."""
        for sequence in sequences:
            sequence.cache = self._new_cache(sequence.max_length)
        for pieces in prefill_passes(sequences, self.prefill_tokens):
            self._read(pieces)
        self.stats.num_prompt_tokens += sum(sequence.prompt_length for sequence in sequences)
        self.stats.num_new_tokens += len(sequences)
        self._draft(sequences)

    @torch.inference_mode()
    def step(self, sequences: list[Sequence]) -> None:
        """Gives every sequence at least one more token, and up to one more than it had drafts."""
        fed = [[sequence.tokens[-1], *sequence.drafts] for sequence in sequences]
        draws = [
            Draw(sequence.params, sequence.seed, len(sequence.tokens) + offset)
            for sequence, row in zip(sequences, fed, strict=True)
            for offset in range(len(row))
        ]
        hidden = self._forward(sequences, fed)
        decided = self._decide(hidden.post_norm_TD, draws)
        first = 0
        for sequence, row in zip(sequences, fed, strict=True):
            self._confirm(sequence, hidden, first, decided[first : first + len(row)])
            first += len(row)
        self.stats.num_steps += 1
        self.stats.sequence_steps += len(sequences)
        self._draft(sequences)

    def _read(self, pieces: list[Piece]) -> None:
        """One prefill pass; a sequence whose prompt ends in it gets its first token."""
        sequences = [piece.sequence for piece in pieces]
        hidden = self._forward(sequences, [piece.sequence.tokens[piece.start : piece.stop] for piece in pieces])
        ends = list(itertools.accumulate(piece.stop - piece.start for piece in pieces))
        if self._drafter:
            for (sequence, start, stop), end in zip(pieces, ends, strict=True):
                self._drafter.observe(sequence, hidden, slice(end - (stop - start), end))
            self._drafter.follow_prompt(sequences)
        read_whole = [
            (piece.sequence, end - 1)
            for piece, end in zip(pieces, ends, strict=True)
            if piece.stop == piece.sequence.prompt_length
        ]
        if read_whole:
            draws = [Draw(sequence.params, sequence.seed, sequence.prompt_length) for sequence, _ in read_whole]
            last_rows = torch.tensor([row for _, row in read_whole], device=self.model.device)
            decided = self._decide(hidden.post_norm_TD[last_rows], draws)
            for (sequence, _), (token, logprob) in zip(read_whole, decided, strict=True):
                sequence.add(token, logprob)

    def _confirm(
        self, sequence: Sequence, hidden: Hidden, first_row: int, decided: list[tuple[int, float | None]]
    ) -> None:
        """Keeps a sequence's tokens up to the first that was not drafted, and takes the rest out of its cache."""
        num_offered = len(sequence.drafts)
        num_accepted = count_accepted(sequence.drafts, [token for token, _ in decided])
        if num_accepted < num_offered:
            for layer in range(self._num_main_layers):
                sequence.cache.truncate(layer, len(sequence.tokens) + num_accepted)
        if self._drafter:
            self._drafter.observe(sequence, hidden, slice(first_row, first_row + num_accepted + 1))
            self.stats.count_drafts(num_offered, num_accepted)
        length_before = len(sequence.tokens)
        for token, logprob in decided[: num_accepted + 1]:
            if not sequence.finish_reason:
                sequence.add(token, logprob)
        self.stats.num_decoded_tokens += len(sequence.tokens) - length_before
        self.stats.num_new_tokens += len(sequence.tokens) - length_before

    def _draft(self, sequences: list[Sequence]) -> None:
        running = [sequence for sequence in sequences if not sequence.finish_reason]
        if self._drafter and running:
            self._drafter.draft(running)

    def _forward(self, sequences: list[Sequence], token_lists: list[list[int]]) -> Hidden:
        lengths = tuple(len(tokens) for tokens in token_lists)
        caches = [sequence.cache for sequence in sequences]
        context = CachedContext(caches, lengths, first_layer=0, rotary=self._rotary)
        tokens = [token for tokens in token_lists for token in tokens]
        return self.model(torch.tensor(tokens, device=self.model.device), context)

    def _new_cache(self, max_positions: int) -> KVCache:
        return KVCache(
            self._cached_layers,
            max_positions=max_positions,
            max_drafts=self.num_drafts,
            dtype=self._dtype,
            device=self.model.device,
        )

    def _decide(self, states_RD: torch.Tensor, draws: list[Draw]) -> list[tuple[int, float | None]]:
        """A token for each row, with its log-probability if any request of the batch asks for them."""
        logits_RV = self.model.head(states_RD)
        tokens = sample(logits_RV, draws)
        if not any(draw.params.logprobs for draw in draws):
            return [(token, None) for token in tokens]
        return list(zip(tokens, chosen_logprobs(logits_RV, tokens, draws), strict=True))


def prefill_passes(sequences: list[Sequence], tokens_per_pass: int) -> Iterator[list[Piece]]:
    """Cuts prompts into passes of at most `tokens_per_pass` tokens, in order; a sequence is in a pass at most once."""
    pieces: list[Piece] = []
    room = tokens_per_pass
    for sequence in sequences:
        start = 0
        while start < sequence.prompt_length:
            stop = min(start + room, sequence.prompt_length)
            pieces.append(Piece(sequence, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], tokens_per_pass
    if pieces:
        yield pieces
