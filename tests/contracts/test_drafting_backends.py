"""Every backend of drafting plans the rows that loops over texts give, counts accepted drafts, and moves texts on."""

import random

import pytest
import torch

from openmimo.engine.sampler import seed_key, uniform
from openmimo.kernels.operations import (
    DRAFTING,
    DraftingNeed,
    DraftingSizes,
    advance_texts,
    drafting_slots,
    insert_drafts,
    plan_drafting,
)

BACKENDS = dict(DRAFTING.backends())
PAGE, PARTS, PADDING = 16, 2, 2


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    chosen = BACKENDS[request.param]
    if reason := chosen.refuse(DraftingNeed(True)):
        pytest.skip(reason)
    monkeypatch.setattr(DRAFTING, "choose", lambda need: (request.param, chosen))


class Text:
    """A text of a sequence: its tokens, and what the heads have computed of it."""

    def __init__(self, generator, seat, num_drafts):
        self.seat, self.seed = seat, generator.randrange(1 << 64)
        self.tokens = [generator.randrange(1000) for _ in range(generator.randrange(2, 60))]
        computed = len(self.tokens) - 1
        self.states_start = max(0, computed - generator.randrange(2 * num_drafts + 2))
        self.heads = [max(0, computed - generator.randrange(1, 2 * num_drafts + 2)) for _ in range(num_drafts)]
        self.whole_from = generator.choice([0, 0, max(0, computed - 1)])
        self.limit = generator.randrange(num_drafts + 1)
        self.max_length = len(self.tokens) + generator.choice([0, 1, 2, 9])

    def row(self, ring_positions):
        ring = [0] * ring_positions
        for position, token in list(enumerate(self.tokens))[-ring_positions:]:
            ring[position % ring_positions] = token
        return [len(self.tokens), self.states_start, seed_key(self.seed), *self.heads, *ring]

    def start(self, head):
        return max(self.heads[head], self.states_start)

    @property
    def num_drafts(self):
        computed = len(self.tokens) - 1
        left = max(self.max_length - 1 - len(self.tokens), 0)
        return min(self.limit, left) if self.start(0) < computed else 0


def case(seed):
    """Sizes, texts, and the arguments of a plan: padded to more sequences, each with its seat."""
    generator = random.Random(seed)
    num_drafts, count = generator.choice([1, 2, 3]), generator.randrange(1, 7)
    texts = [Text(generator, seat, num_drafts) for seat in generator.sample(range(9), count)]
    num_heads, ring = max(max(text.limit for text in texts), seed % 2), 1 << (3 * num_drafts + 1).bit_length()
    rows_of_head = 1 << (2 * num_drafts).bit_length()
    sizes = DraftingSizes(
        num_heads,
        num_drafts,
        ring,
        (count + PADDING) * rows_of_head,
        (count + PADDING) * (1 + num_heads),
        10 * ring - 1,
    )
    memory = torch.zeros(10, sizes.first_token + ring, dtype=torch.int64)
    for text in texts:
        memory[text.seat] = torch.tensor(text.row(ring))
    seats = torch.tensor([text.seat for text in texts] + [9] * PADDING)
    limits = torch.tensor([text.limit for text in texts] + [-1] * PADDING)
    most = torch.tensor([text.max_length for text in texts] + [1] * PADDING)
    return sizes, texts, memory, seats, limits, most


def passes(sizes, texts):
    """For each pass, the rows (sequence, position, token or the number of its draft)."""
    found = []
    for head in range(sizes.num_heads):
        rows = []
        for number, text in enumerate(texts):
            if text.num_drafts > head:
                for position in range(text.start(head), len(text.tokens) - 1):
                    index = position + 1 + head
                    known = index < len(text.tokens)
                    rows.append((number, position, text.tokens[index] if known else (index - len(text.tokens),)))
        found.append(rows)
    main = []
    for number, text in enumerate(texts):
        main.append((number, len(text.tokens) - 1, text.tokens[-1]))
        main += [(number, len(text.tokens) + draft, (draft,)) for draft in range(text.num_drafts)]
    return [*found, main]


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_those_of_the_texts(backend, seed):
    sizes, texts, memory, seats, limits, most = case(seed)
    before = memory.clone()
    rows = plan_drafting(memory, seats, limits, most, sizes)
    assert torch.equal(memory, before)
    drafts = torch.randint(1000, 2000, (sizes.num_heads, len(seats)), generator=torch.Generator().manual_seed(seed))
    rows.tokens_LB[1:] = drafts
    tables = torch.randint(0, 99, (PARTS, len(seats) + 1, 9), generator=torch.Generator().manual_seed(seed)).int()
    tables = tables[:, :-1, :6]  # a part of a larger buffer
    whole_from = torch.tensor([text.whole_from for text in texts] + [0] * PADDING)
    pages, offsets = drafting_slots(tables, rows, whole_from, PAGE)
    tokens = insert_drafts(rows.token_Q, rows.source_Q, rows.tokens_LB)
    for number, expected in enumerate(passes(sizes, texts)):
        first = number * sizes.head_rows
        stop = first + (sizes.head_rows if number < sizes.num_heads else sizes.main_rows)
        for sequence in range(len(texts)):
            own = [place for place, row in enumerate(expected) if row[0] == sequence]
            assert rows.counts_LB[number, sequence] == len(own)
            assert rows.keys_LB[number, sequence] == (1 + expected[own[-1]][1] if own else 0)
            if own:
                assert rows.first_LB[number, sequence] == own[0] and rows.last_LB[number, sequence] == own[-1]
        assert rows.counts_LB[number, len(texts) :].tolist() == rows.keys_LB[number, len(texts) :].tolist() == [0, 0]
        assert rows.is_row_Q[first:stop].tolist() == [place < len(expected) for place in range(stop - first)]
        for place, (sequence, position, token) in enumerate(expected, first):
            text = texts[sequence]
            assert (rows.sequence_Q[place], rows.position_Q[place]) == (sequence, position)
            assert tokens[place] == (drafts[token[0], sequence] if isinstance(token, tuple) else token)
            assert rows.state_Q[place] == text.seat * sizes.ring_positions + position % sizes.ring_positions
            assert rows.uniform_Q[place] == uniform(text.seed, position + 1) and rows.seat_Q[place] == text.seat
            known = position >= text.whole_from
            assert pages[:, place].tolist() == (tables[:, sequence, position // PAGE].tolist() if known else [-1] * 2)
            assert offsets[place] == position % PAGE
        surplus = slice(first + len(expected), stop)
        assert (pages[:, surplus] == -1).all() and (rows.state_Q[surplus] == sizes.spare_place).all()
        assert (rows.position_Q[surplus] == 0).all() and (tokens[surplus] >= 0).all()


@pytest.mark.parametrize("seed", range(12))
def test_texts_grow_by_accepted_drafts_and_one_token(backend, seed):
    sizes, texts, memory, seats, limits, most = case(seed)
    generator = random.Random(seed)
    rows = plan_drafting(memory, seats, limits, most, sizes)
    for drafts_B in rows.tokens_LB[1:]:
        drafts_B.copy_(torch.tensor([generator.randrange(3) for _ in seats]))
    decided = torch.tensor([generator.choice([0, 1, 2, 2, -1]) for _ in range(sizes.main_rows)])
    new, results = advance_texts(memory, seats, most, rows, decided, sizes)
    first = 0
    for sequence, text in enumerate(texts):
        own = decided[first : first + text.num_drafts + 1].tolist()
        drafts = rows.tokens_LB[1 : 1 + text.num_drafts, sequence].tolist()
        accepted = next(
            (n for n, (draft, token) in enumerate(zip(drafts, own, strict=False)) if draft != token), len(drafts)
        )
        assert results[sequence, : 3 + text.num_drafts].tolist() == [len(drafts), accepted, *own]
        computed, num_drafts = len(text.tokens) - 1, len(text.heads)
        text.states_start = max(text.states_start, computed - num_drafts)
        text.heads = [max(computed - h, 0) if h < len(drafts) else length for h, length in enumerate(text.heads)]
        text.tokens = (text.tokens + [max(token, 0) for token in own[: accepted + 1]])[: text.max_length]
        kept = range(max(len(text.tokens) - 2 * num_drafts - 1, 0), len(text.tokens))
        columns = [sizes.first_token + position % sizes.ring_positions for position in kept]
        expected = torch.tensor(text.row(sizes.ring_positions))
        assert new[sequence, : sizes.first_token].tolist() == expected[: sizes.first_token].tolist()
        assert new[sequence, columns].tolist() == expected[columns].tolist()
        first += len(own)
