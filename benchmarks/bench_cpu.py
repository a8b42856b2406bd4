"""CPU speed compared with other implementations in one run: attention, experts, losses, training step, decoding.

    python -m benchmarks.bench_cpu [--only NAME] [--quick] [--threads N]

Predictions before the first run, from the number of products: Sliding attention needs at least 6x fewer products than
causal attention, which is half of 4096 / (2 x 128 + 64). It is 30x faster than a peer that uses the slow path for
unequal dims. Causal attention needs half the products of that path. docs/log.md contains the results.
"""

import argparse
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks import bench_decode
from benchmarks.harness import Row, median_milliseconds, print_rows, write_rows
from openmimo.core.errors import UserError
from openmimo.kernels.attention import attend
from openmimo.kernels.operations import apply_experts, token_loss
from openmimo.model.context import PackedContext
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo
from openmimo.model.presets import tiny
from openmimo.runtime.device import cpu_multiplies_bfloat16, measured_matmul_flops

CPU = torch.device("cpu")
HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, WINDOW = 16, 2, 192, 128, 128
SDPA = "F.scaled_dot_product_attention, causal"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure_sliding(rounds: int) -> list[Row]:
    """Compares windows of 128 at 4,096 tokens with torch's causal attention. Also measures up to 32,768 tokens."""
    rows = []
    for name, dtype in DTYPES.items():
        q, k, v, sink = _attention_inputs(4096, dtype)
        ours, peer = median_milliseconds([lambda: _ours(q, k, v, sink, WINDOW), lambda: _sdpa(q, k, v)], rounds=rounds)
        rows.append(
            Row(f"sliding 4096 {name}", ours, peer, SDPA, _floor(4096, dtype, WINDOW), 20.0, "the peer has no window")
        )  # fmt: skip
        both = [lambda: _forward_backward(_ours, q, k, v, sink, WINDOW)]
        rows.append(Row(f"sliding 4096 {name}, forward and backward", median_milliseconds(both, rounds=rounds)[0]))
    for length in (8192, 16384, 32768):
        q, k, v, sink = _attention_inputs(length, torch.bfloat16)
        ours = median_milliseconds([lambda: _ours(q, k, v, sink, WINDOW)], rounds=rounds)[0]
        note = f"{ours / length * 1024:.2f} ms per 1,024 tokens"
        rows.append(Row(f"sliding {length} bfloat16", ours, floor_ms=_floor(length, torch.bfloat16, WINDOW), note=note))
    return rows


def measure_full(rounds: int) -> list[Row]:
    """Measures full causal attention at 4,096 tokens."""
    rows = []
    for name, dtype in DTYPES.items():
        q, k, v, _ = _attention_inputs(4096, dtype)
        ours, peer = median_milliseconds([lambda: _ours(q, k, v, None, None), lambda: _sdpa(q, k, v)], rounds=rounds)
        rows.append(
            Row(
                f"full causal 4096 {name}",
                ours,
                peer,
                SDPA,
                _floor(4096, dtype, None),
                5.0,
            )
        )
    return rows


def measure_decode_attention(rounds: int) -> list[Row]:
    """Measures one and four queries with a cache of 4,096 positions."""
    rows = []
    for queries in (1, 4):
        q, k, v, _ = _attention_inputs(4096, torch.bfloat16)
        q = q[:queries].contiguous()
        ours, peer = median_milliseconds(
            [lambda: _ours(q, k, v, None, None), lambda: _sdpa(q, k, v, causal=False)], rounds=5 * rounds
        )
        note = "" if queries == 1 else "the peer computes no mask"
        rows.append(Row(f"decode {queries} x 4096 bfloat16", ours, peer, "F.scaled_dot_product_attention", note=note))
    return rows


def measure_experts(rounds: int) -> list[Row]:
    """Measures 64 experts of 512, eight active, 1,024 dims, forward and backward."""
    rows = []
    for tokens in (512, 2048):
        x = torch.randn(tokens, 1024, dtype=torch.bfloat16)
        ids, weights = torch.rand(tokens, 64).topk(8).indices, torch.rand(tokens, 8)
        gate_up = (0.05 * torch.randn(64, 1024, 1024)).to(torch.bfloat16).requires_grad_()
        down = (0.05 * torch.randn(64, 1024, 512)).to(torch.bfloat16).requires_grad_()
        ours, peer = median_milliseconds(
            [
                lambda: apply_experts(x, ids, weights, gate_up, down).backward(x),
                lambda: _grouped_experts(x, ids, weights, gate_up, down).backward(x),
            ],
            rounds=rounds,
        )
        floor = 3 * 2 * tokens * 8 * 3 * 1024 * 512 / measured_matmul_flops(CPU, torch.bfloat16) * 1e3
        rows.append(Row(f"experts {tokens} tokens bfloat16", ours, peer, "F.grouped_mm on sorted tokens", floor))
    return rows


def measure_token_loss(rounds: int) -> list[Row]:
    """Measures loss and gradients of 1,024 tokens with a vocabulary of 32,768 and 512 dims."""
    hidden = torch.randn(1024, 512, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.05 * torch.randn(32768, 512)).to(torch.bfloat16).requires_grad_()
    labels, weights = torch.randint(0, 32768, (1024,)), torch.full((1024,), 1 / 1024)
    ours, peer = median_milliseconds(
        [
            lambda: token_loss(hidden, weight, labels, weights).backward(),
            lambda: F.cross_entropy((hidden @ weight.T).float(), labels).backward(),
        ],
        rounds=rounds,
    )
    floor = 3 * 2 * 1024 * 512 * 32768 / measured_matmul_flops(CPU, torch.bfloat16) * 1e3
    return [Row("token loss 1024 x 32768 bfloat16", ours, peer, "F.cross_entropy on whole logits", floor)]


def measure_training_step(rounds: int) -> list[Row]:
    """Measures a step of `tiny` without MTP heads on 2,048 tokens: loss, gradients and AdamW, from the same weights."""
    return [_training_step(name, dtype, rounds) for name, dtype in DTYPES.items()]


def measure_decode(rounds: int) -> list[Row]:
    """Compares greedy decoding of `tiny` with `generate`, and speculative with plain decoding if all drafts pass."""
    rows = []
    threads = torch.get_num_threads()
    for row in bench_decode.measure_against_transformers(num_threads=threads, rounds=rounds):
        rows.append(
            Row(
                f"decode tiny, batch {row.batch_size}, per token",
                1e3 / row.openmimo_tokens_per_second,
                1e3 / row.transformers_tokens_per_second,
                "transformers generate",
                goal=3.0 if row.batch_size == 1 else None,
                note=f"{row.openmimo_tokens_per_second:.0f} tokens/s" + ("" if row.same_tokens else ", texts differ"),
            )
        )
    row = bench_decode.measure_speculation(num_threads=threads, rounds=rounds)
    rows.append(
        Row(
            "decode tiny, one MTP head always right, per token",
            1e3 / row.speculative_tokens_per_second,
            1e3 / row.plain_tokens_per_second,
            "openmimo, plain",
            note=f"{row.accepted_tokens_per_step:.2f} tokens per step",
        )
    )
    return rows


MEASUREMENTS: dict[str, Callable[[int], list[Row]]] = {
    "sliding": measure_sliding,
    "full": measure_full,
    "decode_attention": measure_decode_attention,
    "experts": measure_experts,
    "token_loss": measure_token_loss,
    "training_step": measure_training_step,
    "decode": measure_decode,
}


AGAINST_TRANSFORMERS = ("training_step", "decode")


def main() -> None:
    """Runs the measurements that the command line selects."""
    run(parse(None))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line (None: `sys.argv`). Exits with code 2 for invalid options."""
    parser = argparse.ArgumentParser(prog="openmimo bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=MEASUREMENTS, help="run only this measurement")
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args(arguments)
    if not 1 <= options.threads <= 1024:
        parser.error(f"--threads is {options.threads}; it must be 1 to 1024")
    return options


def chosen(only: str | None) -> list[str]:
    """Returns the names of the measurements. Without transformers, omits those that need it and prints their names.

    Args:
        only: A single measurement (None: all).

    Raises:
        UserError: Measurement `only` needs transformers.
    """
    names = [only] if only else list(MEASUREMENTS)
    if importlib.util.find_spec("transformers") is not None:
        return names
    if only in AGAINST_TRANSFORMERS:
        raise UserError(f"{only} is measured against transformers, which is not installed: make test installs it.")
    print(f"left out because transformers is not installed (make test installs it): {', '.join(AGAINST_TRANSFORMERS)}")
    return [name for name in names if name not in AGAINST_TRANSFORMERS]


def run(options: argparse.Namespace) -> None:
    """Runs the measurements, prints a table, and writes the results unless --quick."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    names = chosen(options.only)
    rows = [row for name in names for row in MEASUREMENTS[name](1 if options.quick else 5)]
    print_rows(rows)
    if not options.quick:
        name = f"bench_cpu_{options.only}" if options.only else "bench_cpu"
        print(f"wrote {write_rows(name, rows, device=CPU, threads=options.threads)}")


def _attention_inputs(length: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    shapes = ((length, HEADS, KEY_DIM), (length, KV_HEADS, KEY_DIM), (length, KV_HEADS, VALUE_DIM))
    return *(torch.randn(shape).to(dtype) for shape in shapes), torch.randn(HEADS)


def _ours(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, window_keys: int | None
) -> torch.Tensor:
    return attend(q, k, v, sink, query_lengths=(len(q),), key_lengths=(len(k),), window_keys=window_keys).out_TNV


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _forward_backward(function: Callable[..., torch.Tensor], q, k, v, *rest) -> None:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, *rest)
    out.backward(out.detach())


def _floor(length: int, dtype: torch.dtype, window_keys: int | None) -> float:
    """Returns milliseconds of the necessary products at the rate of a large matrix product."""
    pairs = length * (length + 1) / 2 if window_keys is None else length * window_keys
    if dtype == torch.bfloat16 and not cpu_multiplies_bfloat16():
        dtype = torch.float32
    return 2 * HEADS * (KEY_DIM + VALUE_DIM) * pairs / measured_matmul_flops(CPU, dtype) * 1e3


def _grouped_experts(x, ids, weights, gate_up, down) -> torch.Tensor:
    """A typical implementation of experts with torch's grouped product."""
    order = ids.flatten().argsort()
    ends = torch.bincount(ids.flatten(), minlength=len(down)).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x[order // ids.shape[1]], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    weighted = y.float() * weights.flatten()[order, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, order // ids.shape[1], weighted).to(x.dtype)


def _training_step(name: str, dtype: torch.dtype, rounds: int) -> Row:
    from transformers import AutoModelForCausalLM

    model = MiMo(replace(tiny(), mtp=None, max_positions=4096))
    model.initialize(torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_model(model, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.compute_dtype = dtype
    ids = torch.randint(0, 512, (2048,), generator=torch.Generator().manual_seed(1))
    labels, weights = torch.cat([ids[1:], torch.tensor([-1])]), torch.full((2048,), 1 / 2047)
    ours_optimizer, theirs_optimizer = (torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (model, theirs))

    def ours_step() -> None:
        hidden = model(ids, PackedContext((2048,))).post_norm_TD
        model.head.loss(hidden, labels, weights).backward()
        ours_optimizer.step()
        ours_optimizer.zero_grad()

    def theirs_step() -> None:
        theirs(ids[None], labels=ids[None]).loss.backward()
        theirs_optimizer.step()
        theirs_optimizer.zero_grad()

    ours, peer = median_milliseconds([ours_step, theirs_step], rounds=rounds)
    note = f"{2048e3 / ours:.0f} against {2048e3 / peer:.0f} tokens/s"
    if dtype == torch.bfloat16:
        note += "; ours keeps float32 weights"
    return Row(f"training step tiny 2048 {name}", ours, peer, "transformers", goal=2.0, note=note)


if __name__ == "__main__":
    main()
