"""The server's warm-up: afterwards nothing is cached or counted, and a model that cannot generate is refused."""

import pytest
import torch
from tiny_checkpoint import save_tiny_checkpoint

from openmimo.core.errors import UserError
from openmimo.engine.llm import LLM
from openmimo.engine.server.serve import warm_up


@pytest.fixture
def llm(tmp_path):
    return LLM(save_tiny_checkpoint(tmp_path))


def test_a_warm_up_leaves_nothing_behind(llm):
    free = llm.engine.arena.num_used
    warm_up(llm.engine, llm.tokenizer)
    assert llm.engine.arena.num_used == free and not llm.engine.has_work
    assert llm.stats()["num_new_tokens"] == llm.stats()["num_prompt_tokens"] == 0


def test_a_model_that_cannot_generate_is_refused(llm):
    with torch.no_grad():
        llm.model.head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        warm_up(llm.engine, llm.tokenizer)
