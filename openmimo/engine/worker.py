"""Executes steps on one device: the forward pass, sampling, the verification of drafts, and the drafting heads.

A worker knows no requests: it takes the tensors of a step and returns tensors. Two workers with equal weights, page
contents and states return equal results for equal steps. Several ranks of one engine would rely on this.

T packed tokens, B sequences, R decided rows, H drafting heads, D model dim.
"""

import torch

from openmimo.engine.cache import PageArena
from openmimo.engine.context import PagedContext, RotaryRows
from openmimo.engine.sampler import decide, decided_logprobs
from openmimo.engine.step import HeadInput, StepInput, StepOutput
from openmimo.model.backbone import Hidden
from openmimo.model.mimo import MiMo


class Worker:
    """A model, its cache arena, and the newest main-model states of each sequence, which the MTP heads read.

    Each seat has a ring of states: the state of position i is in row `seat * ring_positions + i % ring_positions`.
    The ring holds at least 2 * num_drafts + 1 positions: the last head lags by num_drafts, a step adds num_drafts + 1.
    """

    def __init__(self, model: MiMo, arena: PageArena, *, num_drafts: int):
        self._model = model
        self._arena = arena
        self._context = PagedContext(arena, RotaryRows(model.device, model.config.max_positions))
        self._reads_pre_norm = model.config.mtp is not None and model.config.mtp.hidden == "pre_norm"
        self.ring_positions = 1 << (2 * num_drafts).bit_length()
        self._states_XD: torch.Tensor | None = None

    @torch.inference_mode()
    def execute(self, step: StepInput) -> StepOutput:
        """Runs the main layers over the new tokens, stores their states, decides tokens and verifies drafts."""
        context = self._context.bind(step.main, records_routing=step.records_routing)
        hidden = self._model(step.main.token_ids_T, context)
        recorded = context.routing.recorded
        if step.state_places_T is not None:
            states_TD = hidden.pre_norm_TD if self._reads_pre_norm else hidden.post_norm_TD
            kept_XD = self._states(states_TD)
            for head in step.prompt_heads:
                places_T1 = head.state_places_T[:, None]
                old_TD = kept_XD[head.state_places_T.clamp(min=0)]
                new_TD = states_TD[(-1 - head.state_places_T).clamp(min=0)]
                self._run_head(head, torch.where(places_T1 >= 0, old_TD, new_TD))
            rows_TD = states_TD if step.state_rows_T is None else states_TD[step.state_rows_T]
            kept_XD[step.state_places_T] = rows_TD
        tokens_R = num_accepted_B = None
        logprobs_R = top_ids_RV = top_logprobs_RV = None
        if step.sampling is not None:
            states_RD = hidden.post_norm_TD
            if step.decided_rows_R is not None:
                states_RD = states_RD[step.decided_rows_R]
            logits_RV = self._model.head(states_RD)
            tokens_R = decide(logits_RV, step.sampling)
            if step.sampling.logprob_temperature_R1 is not None:
                logprobs_R, top_ids_RV, top_logprobs_RV = decided_logprobs(logits_RV, tokens_R, step.sampling)
            if step.draft_rows_BK is not None:
                num_accepted_B = count_accepted(step.main.token_ids_T, tokens_R, step.draft_rows_BK)
        routing_TLA = None
        if step.records_routing:
            routing_TLA = torch.stack([recorded[layer] for layer in sorted(recorded)], dim=1)
        return StepOutput(
            tokens_R, num_accepted_B, logprobs_R, top_ids_RV, top_logprobs_RV, routing_TLA, hidden.post_norm_TD
        )

    @torch.inference_mode()
    def draft(self, heads: list[HeadInput], num_sequences: int) -> torch.Tensor:
        """Runs the drafting heads in order: drafts, int64 [H, B]. A head reads the drafts of earlier ones."""
        drafts_HB = torch.zeros(len(heads), num_sequences, dtype=torch.int64, device=self._model.device)
        assert self._states_XD is not None, "heads draft after the main layers"
        for step in heads:
            if step.draft_rows is not None:
                step.forward.token_ids_T[step.draft_rows] = drafts_HB.view(-1)[step.draft_sources]
            states_BD = self._run_head(step, self._states_XD[step.state_places_T])
            if step.last_rows_B is not None:
                states_BD = states_BD[step.last_rows_B]
            tokens_B = self._model.head(states_BD).argmax(dim=-1)
            if step.sequences_B is None:
                drafts_HB[step.head] = tokens_B
            else:
                drafts_HB[step.head, step.sequences_B] = tokens_B
        return drafts_HB

    def _run_head(self, step: HeadInput, states_TD: torch.Tensor) -> torch.Tensor:
        """Runs one head over its new positions; returns its states [T, D]."""
        hidden = Hidden(pre_norm_TD=states_TD, post_norm_TD=states_TD)  # the worker keeps only the one that heads read
        return self._model.mtp(step.head, hidden, step.forward.token_ids_T, self._context.bind(step.forward))

    def states(self, seat: int, first: int, stop: int) -> torch.Tensor:
        """The stored states of positions `first` to `stop` of a sequence, [positions, D]."""
        assert self._states_XD is not None
        positions = torch.arange(first, stop, device=self._model.device)
        return self._states_XD[seat * self.ring_positions + positions % self.ring_positions]

    def _states(self, like_TD: torch.Tensor) -> torch.Tensor:
        """The memory of the states, grown to hold every seat."""
        num_rows, states_XD = self._arena.num_seats * self.ring_positions, self._states_XD
        if states_XD is None or len(states_XD) < num_rows:
            grown_XD = like_TD.new_zeros(2 * num_rows, like_TD.shape[1])
            if states_XD is not None:
                grown_XD[: len(states_XD)] = states_XD
            self._states_XD = states_XD = grown_XD
        return states_XD


def count_accepted(token_ids_T: torch.Tensor, tokens_T: torch.Tensor, draft_rows_BK: torch.Tensor) -> torch.Tensor:
    """Counts the leading drafts of each sequence that equal the decided tokens, int64 [B].

    Args:
        token_ids_T: Tokens of a pass: for each sequence its newest token, then its drafts.
        tokens_T: The token decided after each.
        draft_rows_BK: As in `StepInput`.
    """
    is_right_T = torch.zeros_like(token_ids_T, dtype=torch.bool)  # the last row decides no draft, so it stays false
    torch.eq(token_ids_T[1:], tokens_T[:-1], out=is_right_T[:-1])
    return is_right_T[draft_rows_BK].cumprod(dim=1).sum(dim=1)
