"""With the compiled kernels, decoding in bfloat16 does not depend on the batch (docs/engine.md)."""

import pytest
from tiny_checkpoint import save_tiny_checkpoint

from openmimo.core.records import SamplingParams
from openmimo.engine.llm import LLM
from openmimo.kernels import native


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("speculative", [False, True])
def test_texts_after_one_token_do_not_depend_on_the_batch(tmp_path, speculative):
    llm = LLM(save_tiny_checkpoint(tmp_path), dtype="bfloat16", prefix_cache=False, speculative=speculative)
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    prompts = [[token] for token in range(20, 28)]
    together = [done.token_ids for done in llm.generate(prompts, params)]
    assert together == [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
