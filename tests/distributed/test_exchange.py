"""The cut of packed documents over ranks: nothing is lost, work is balanced, and only the keys that are seen travel."""

import pytest
import torch

from openmimo.parallel.context import Segment, fetched_rows, segments_of
from openmimo.parallel.exchange import plan_fetch
from openmimo.parallel.head_exchange import exchanges_heads


def held(lengths: tuple[int, ...], num_ranks: int) -> list[torch.Tensor]:
    return [
        torch.cat([torch.arange(piece.start, piece.stop) for piece in segments_of(lengths, rank, num_ranks)])
        for rank in range(num_ranks)
    ]


def pairs(segments: list[Segment]) -> int:
    """Query-key pairs of a full layer."""
    return sum(position - piece.document_start + 1 for piece in segments for position in range(piece.start, piece.stop))


@pytest.mark.parametrize("lengths", [(64,), (5, 3, 56), (1,) * 64, (20, 44)])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_token_is_held_once(lengths, num_ranks):
    rows = torch.cat(held(lengths, num_ranks))
    assert torch.equal(rows.sort().values, torch.arange(64))


def test_a_long_document_gives_every_rank_the_same_work():
    work = [pairs(segments_of((512,), rank, 4)) for rank in range(4)]
    assert max(work) == min(work)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("window_keys", [4, 17])
def test_a_halo_has_the_keys_of_the_window_only(num_ranks, window_keys):
    """Each chunk but the first needs window_keys - 1 rows of the chunk before, unless its own rank holds that."""
    T = 1024
    rows = held((T,), num_ranks)
    needed = [
        torch.cat(
            [torch.arange(piece.first_key(window_keys), piece.stop) for piece in segments_of((T,), rank, num_ranks)]
        )
        for rank in range(num_ranks)
    ]
    received = [plan_fetch(rank, rows, needed, torch.device("cpu")).num_received for rank in range(num_ranks)]
    # chunks 2 .. 2C - 1 have a predecessor on another rank, except the middle one: rank C - 1 holds chunks C - 1 and C
    assert sum(received) == (2 * num_ranks - 2) * (window_keys - 1)


def test_a_full_layer_fetches_each_key_that_it_sees_once():
    rows, num_ranks, T = held((256,), 4), 4, 256
    needed = [
        torch.cat([torch.arange(0, piece.stop) for piece in segments_of((256,), rank, num_ranks)])
        for rank in range(num_ranks)
    ]
    for rank in range(num_ranks):
        last = 2 * num_ranks - 1 - rank  # the later of the two chunks
        plan = plan_fetch(rank, rows, needed, torch.device("cpu"))
        assert plan.num_received == (last + 1) * T // (2 * num_ranks) - len(rows[rank])


@pytest.mark.parametrize("lengths", [(256,), (100, 3, 153), (16,) * 16, (90, 166)])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_choice_of_an_exchange_counts_the_rows_that_travel(lengths, num_ranks):
    by_rank = [segments_of(lengths, rank, num_ranks) for rank in range(num_ranks)]
    needed = [torch.cat([torch.arange(piece.document_start, piece.stop) for piece in pieces]) for pieces in by_rank]
    rows = held(lengths, num_ranks)
    received = [plan_fetch(rank, rows, needed, torch.device("cpu")).num_received for rank in range(num_ranks)]
    assert fetched_rows(by_rank) == pytest.approx(sum(received) / num_ranks)


def test_auto_exchanges_keys_for_short_documents_and_heads_for_long_ones():
    by_length = {
        lengths: fetched_rows([segments_of(lengths, rank, 8) for rank in range(8)])
        for lengths in ((4096,), (256,) * 16)
    }
    chosen = [
        exchanges_heads("auto", 32, 8, num_ranks=8, num_tokens=4096, fetched_rows=rows) for rows in by_length.values()
    ]
    assert chosen == [True, False]


def test_short_documents_need_nothing_of_other_ranks():
    rows = held((16,) * 16, 4)
    needed = [
        torch.cat([torch.arange(piece.first_key(None), piece.stop) for piece in segments_of((16,) * 16, rank, 4)])
        for rank in range(4)
    ]
    assert all(plan_fetch(rank, rows, needed, torch.device("cpu")).num_received == 0 for rank in range(4))
