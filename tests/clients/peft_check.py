"""transformers and peft: folders that they save are loaded by openmimo, with equal logits."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from checks import Served, check, main
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

IDS = list(range(5, 40))
SCRIPT = """
import json, sys
import torch, openmimo
with torch.inference_mode():
    print(json.dumps(openmimo.load_model(sys.argv[1]).logits(torch.tensor(json.loads(sys.argv[2]))).tolist()))
"""


def check_logits(folder: Path, expected: torch.Tensor) -> None:
    """The logits of openmimo in its own environment, which the driver names."""
    command = [os.environ["OPENMIMO_PYTHON"], "-c", SCRIPT, str(folder), json.dumps(IDS)]
    environment = {**os.environ, "PYTHONPATH": os.environ["OPENMIMO_ROOT"]}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-1000:]
    difference = (torch.tensor(json.loads(done.stdout)) - expected).abs().max()
    assert difference < 1e-3, difference


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float()


@check("transformers save_pretrained")
def _(served: Served) -> None:
    model = AutoModelForCausalLM.from_pretrained(served.folder)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        check_logits(Path(folder), logits(model))


for name, options in {
    "LoRA": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "rank-stabilized LoRA with a saved head": {
        "target_modules": ["q_proj", "k_proj"], "use_rslora": True, "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head"]},
}.items():  # fmt: skip

    @check(f"peft {name}, adapter and merged")
    def _(served: Served, options: dict = options) -> None:
        torch.manual_seed(0)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(served.folder), LoraConfig(r=4, lora_alpha=8, **options)
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        expected = logits(model)
        folder = Path(tempfile.mkdtemp())
        try:
            model.save_pretrained(folder / "adapter")
            check_logits(folder / "adapter", expected)
            model.merge_and_unload().save_pretrained(folder / "merged")
            check_logits(folder / "merged", expected)
        finally:
            shutil.rmtree(folder)


main("transformers", "peft")
