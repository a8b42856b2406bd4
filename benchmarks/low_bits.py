"""Losses of models whose layers have equal bytes in different weight formats (recipe `low_bits`), and their picture.

    python -m benchmarks.low_bits train RESULTS.jsonl [--seeds 3] [--arms fairy binary ...]
    python -m benchmarks.low_bits table RESULTS.jsonl
    python -m benchmarks.low_bits picture RESULTS.jsonl CONVERSION.txt docs/images/fairy.svg

`train` appends a line for each finished run and leaves out those that are in the file. `picture` draws these, and the
output of `python -m benchmarks.bench_packed loss`.
"""

import argparse
import json
import re
import statistics
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from openmimo.core.metrics import read_metrics
from openmimo.kernels.weights import TERNARY
from openmimo.model.mimo import MiMo
from openmimo.model.presets import model_config
from openmimo.model.weight_formats import QuantizableModule
from openmimo.train.config import PretrainConfig
from openmimo.train.pretrain import pretrain
from recipes import low_bits

ARMS = ("fairy", "binary", "ternary", "real", "fairy_unquantized", "fairy_plain")


def main() -> None:
    """Runs one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "table", "picture"])
    parser.add_argument("results", type=Path)
    parser.add_argument("conversion", type=Path, nargs="?")
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    options = parser.parse_args()
    if options.command == "train":
        train(options.results, options.seeds, options.arms)
    elif options.command == "table":
        print_table(options.results)
    else:
        draw(options.results, options.conversion, options.image)


def train(results: Path, seeds: int, arms: list[str]) -> None:
    """Trains each arm with each seed and appends the held-out loss after the last step."""
    done = {(line["arm"], line["seed"]) for line in _lines(results)} if results.exists() else set()
    for seed in range(seeds):
        for arm in arms:
            if (arm, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                config: PretrainConfig = replace(getattr(low_bits, arm)(), run_folder=folder, seed=seed)
                pretrain(config)
                metrics = read_metrics(Path(folder) / "metrics.jsonl")
            losses = [(row["step"], row["validation/main"]) for row in metrics if "validation/main" in row]
            flops = sum(row["flops"] for row in metrics if "flops" in row) * config.log_every_steps
            with results.open("a") as file:
                file.write(json.dumps({"arm": arm, "seed": seed, "losses": losses, "flops": flops}) + "\n")


def _lines(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def bytes_of(arm: str) -> tuple[float, float]:
    """Returns the bytes of the packed weights of an arm, and those of the whole model; plain numbers take 2."""
    config: PretrainConfig = getattr(low_bits, arm)()
    with torch.device("meta"):
        model = MiMo(model_config(config.model or "tiny"))
    modules = [module for module in model.modules() if isinstance(module, QuantizableModule)]
    layers = sum(getattr(module, name).numel() for module in modules for name in module.quantizable)
    rest = sum(parameter.numel() for parameter in model.parameters()) - layers
    bits = 16.0
    if config.quantization != "none":
        bits = config.quantization_stages * (2.0 if config.quantization == TERNARY else 1.0)
    return layers * bits / 8, layers * bits / 8 + 2 * rest


def summary(results: Path) -> dict[str, tuple[list[float], float]]:
    """Returns the last held-out losses of each arm over seeds, and its FLOPs."""
    losses, flops = defaultdict(list), {}
    for line in _lines(results):
        losses[line["arm"]].append(line["losses"][-1][1])
        flops[line["arm"]] = line["flops"]
    return {arm: (values, flops[arm]) for arm, values in losses.items()}


def print_table(results: Path) -> None:
    """Prints loss, bytes and FLOPs of each arm as rows of a Markdown table."""
    for arm, (losses, flops) in summary(results).items():
        layers, whole = bytes_of(arm)
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        print(
            f"| `{arm}` | {layers / 1e3:.0f} | {whole / 1e3:.0f} | {flops / 1e12:.2f} | "
            f"{statistics.mean(losses):.3f}{spread} | {len(losses)} |"
        )


def draw(results: Path, conversion: Path, image: Path) -> None:
    """Draws the loss of converted models by bits, and that of trained ones by bytes and FLOPs."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "openmimo"}
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4))
    text = conversion.read_text()
    for name in ("fairy2i", "binary", "ternary", "int4"):
        pattern = rf"^{name}(?: T=\d| group \d+) +([\d.]+) bits  loss rises by ([\d.-]+)"
        points = sorted((float(bits), float(rise)) for bits, rise in re.findall(pattern, text, re.MULTILINE))
        left.plot(*zip(*points, strict=True), marker="o", label=name)
    left.set(xlabel="bits a weight", ylabel="rise of the loss, nats a token", yscale="log", title="conversion")
    left.legend()
    for arm, (losses, flops) in summary(results).items():
        mean = statistics.mean(losses)
        reach = [[mean - min(losses)], [max(losses) - mean]]
        middle.errorbar(bytes_of(arm)[1] / 1e3, mean, reach, marker="o", capsize=3, label=arm)
        right.errorbar(flops / 1e12, mean, reach, marker="o", capsize=3, label=arm)
    middle.set(xlabel="kB of the whole model", ylabel="held-out loss, nats a token", xscale="log", title="training")
    right.set(xlabel="FLOPs of training, 10^12", ylabel="held-out loss, nats a token", xscale="log", title="training")
    right.legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(image, metadata={"Date": None})


if __name__ == "__main__":
    main()
