"""`openmimo compare`: the same held-out problems for every model."""

import json
from dataclasses import replace

from rich.console import Console

from openmimo.core import metrics
from openmimo.model.embedded import EMBEDDED
from openmimo.rl.compare import compare
from recipes import tiny_cpu


def test_equal_models_have_equal_rewards_and_the_time_left_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "_SHORT_SECONDS", 0.0)  # the time left is printed for any work
    recipe = tiny_cpu.compare()
    config = replace(
        recipe, base=EMBEDDED, models={"student": (EMBEDDED,)}, teachers={}, sources=recipe.sources[:1], problems=4,
        run_folder=str(tmp_path / "run"),
    )  # fmt: skip
    compare(config, console=Console())
    rewards = json.loads((tmp_path / "run" / "results.json").read_text())["rewards"]
    assert rewards["student"] == rewards["base"] and len(rewards["base"][0]["sorting"]) == 4
    assert capsys.readouterr().out.count(" left, at the speed so far") == 1
