"""The demo at toy size: all parts run, the report exists, a second start does nothing, transformers loads the model."""

from dataclasses import replace

import pytest
import torch

import openmimo
from openmimo.core.errors import ConfigError
from openmimo.demo.story import run
from recipes import tiny_cpu


def toy(folder):
    """The shipped demo with fewer and smaller steps."""
    demo = tiny_cpu.demo_in(str(folder))

    def short(stage):
        return replace(
            stage, steps=3, global_batch_size=4, initial_batch_size=None, batch_warmup_steps=0, warmup_steps=0,
            constant_steps=0,
            mixture=replace(
                stage.mixture,
                sources=tuple(replace(s, max_megabytes=0.4 if s.max_megabytes else 0.0) for s in stage.mixture.sources),
            ),
        )  # fmt: skip

    pretrain = replace(
        demo.pretrain, stages=tuple(map(short, demo.pretrain.stages)), threads=1, log_every_steps=1,
        tokenizer=replace(demo.pretrain.tokenizer, train_megabytes=0.3),
    )  # fmt: skip
    extend = replace(
        demo.extend, steps=2, global_batch_size=1, sequence_length=256, threads=1, log_every_steps=1,
        mixture=short(demo.pretrain.stages[1]).mixture,
    )  # fmt: skip
    fast = {"steps": 1, "groups_per_step": 4, "max_draws": 1.0, "dynamic_sampling": False}
    fast["evaluation"] = replace(demo.mopd.evaluation, problems=4)
    taught = {demo.teachers[0].sources[0].name: f"{demo.teachers[0].run_folder}/model"}
    sft = replace(demo.sft, steps=2, global_batch_size=2, warmup_steps=0, log_every_steps=1)
    return replace(
        demo, sft=sft, teachers=(replace(demo.teachers[0], **fast),),
        mopd=replace(demo.mopd, **fast, teachers={**dict.fromkeys(demo.mopd.teachers, "self"), **taught}),
        compare=replace(demo.compare, problems=4, models={"student": (f"{folder}/mopd/model",)}, teachers={}),
        pretrain=pretrain, extend=extend, retrieval_lengths=(64,), retrieval_examples=4, decode_prompts=2,
        decode_tokens=20,
    )  # fmt: skip


@pytest.mark.slow
def test_the_story(tmp_path, capsys):
    before = torch.get_num_threads()
    config = toy(tmp_path / "demo")
    report = run(config)
    page = report.read_text()
    assert page.count("<img") >= 10
    assert "Context extension" in page and "the see-saw" in page
    out = capsys.readouterr().out
    assert "retrieval after" in out and "student" in out
    assert "the same text" in out
    written = report.stat().st_mtime_ns, (tmp_path / "demo" / "extend" / "metrics.jsonl").stat().st_mtime_ns
    run(config)
    assert (tmp_path / "demo" / "extend" / "metrics.jsonl").stat().st_mtime_ns == written[1]

    with pytest.raises(ConfigError, match="other settings"):
        run(replace(config, decode_tokens=21))

    transformers = pytest.importorskip("transformers")
    model_folder = tmp_path / "demo" / "extend" / "model"
    ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(model_folder).encode("def main(argv):\n    return 0"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    ours = openmimo.load_model(model_folder)
    assert len(ours.model.mtp.layers) == 3
    with torch.no_grad():
        assert (theirs(ids[None]).logits[0] - ours.logits(ids)).abs().max() < 1e-4
    torch.set_num_threads(before)
