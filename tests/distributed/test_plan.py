"""The plan's bytes are those of real processes, and its search finds meshes that fit."""

import multiprocessing
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as distributed_c10d
from conftest import tiny_config
from distributed.processes import run_processes
from distributed.test_equals_one_process import CPU, WHOLE

from openmimo.core.errors import ConfigError
from openmimo.model.config import ModelConfig
from openmimo.model.context import RoutingTape
from openmimo.model.heads import micro_batch
from openmimo.model.mimo import MiMo
from openmimo.model.presets import model_config
from openmimo.parallel.dry_run import dry_run
from openmimo.parallel.mesh import build_mesh
from openmimo.parallel.plan import (
    CARDS,
    MeshSizes,
    StepShape,
    kept_parameters,
    meshes,
    pipeline_seconds,
    plan,
    search,
)
from openmimo.parallel.ranks import Ranks
from openmimo.parallel.stages import PipelineOptions
from openmimo.train.loss import loss_of_states

STEP = StepShape(sequence_length=128, rows=8, micro_batch_rows=2, activation_bytes=4)
CONFIG = tiny_config(mtp_heads=2)
MESHES = [
    MeshSizes(dp_shard=4), MeshSizes(dp_shard=2, cp=2), MeshSizes(cp=4), MeshSizes(dp_replicate=2, dp_shard=2),
    MeshSizes(dp_shard=2, tp=2), MeshSizes(dp_shard=2, cp=2, ep=4), MeshSizes(dp_shard=4, ep=2),
    MeshSizes(dp_shard=2, pp=2), MeshSizes(cp=2, pp=2, stages_per_rank=2), MeshSizes(pp=4), MeshSizes(tp=2, pp=2),
]  # fmt: skip


TIED = replace(CONFIG, tie_embeddings=True)
MANY_KEYS = replace(
    CONFIG,
    layers=tuple(
        replace(layer, attention=replace(layer.attention, num_kv_heads=8)) if layer.attention.kind == "full" else layer
        for layer in CONFIG.layers
    ),
)
HEADS = replace(STEP, cp_exchange="heads")
LONG = replace(STEP, micro_batch_rows=1)
CASES = [
    *((CONFIG, sizes, STEP) for sizes in MESHES),
    *((TIED, sizes, STEP) for sizes in (MESHES[0], MESHES[4])),
    *((config, MeshSizes(cp=4), step) for config in (CONFIG, MANY_KEYS) for step in (HEADS, LONG)),
    (CONFIG, MeshSizes(cp=2, tp=2), HEADS),
    (CONFIG, MeshSizes(cp=2, pp=2), HEADS),
    (MANY_KEYS, MeshSizes(cp=4), replace(LONG, cp_exchange="keys")),
]


def measured(config: ModelConfig, sizes: MeshSizes, shape: StepShape) -> dict[str, float]:
    """Bytes that this process keeps, and receives in a step, with the messages of collectives counted by kind."""
    counts: Counter = Counter()

    def count(name, kind, share):
        inner = getattr(dist, name)

        def counted(output, *arguments, **options):
            group = options.get("group") or dist.group.WORLD
            ranks = dist.get_world_size(group)
            counts[kind] += output.numel() * output.element_size() * share(ranks)
            return inner(output, *arguments, **options)

        setattr(dist, name, counted)

    count(
        "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor",
        "gather",
        lambda n: (n - 1) / n,
    )
    count(
        "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor",
        "scatter",
        lambda n: n - 1,
    )
    count("all_reduce", "reduce", lambda n: 2 * (n - 1) / n)
    inner = dist.all_to_all_single

    def exchanged(output, given, output_split_sizes=None, input_split_sizes=None, group=None):
        own = 0 if output_split_sizes is None else output_split_sizes[dist.get_rank(group)]
        rows = sum(output_split_sizes or [])
        counts["exchange"] += (rows - own) * output[:1].numel() * output.element_size()
        return inner(output, given, output_split_sizes, input_split_sizes, group=group)

    dist.all_to_all_single = exchanged
    receive = dist.irecv

    def received(tensor, *arguments, **options):
        counts["states"] += tensor.numel() * tensor.element_size()
        return receive(tensor, *arguments, **options)

    dist.irecv = distributed_c10d.irecv = received  # which the messages of a pipeline are compared with
    mesh = {name: getattr(sizes, name) for name in (*WHOLE, "pp")}
    ranks = Ranks(build_mesh("cpu", **mesh), CPU, pipeline_options(sizes), cp_exchange=shape.cp_exchange)
    model = MiMo(config)
    model.initialize(torch.Generator().manual_seed(0))
    ranks.apply(model.train())
    generator = torch.Generator().manual_seed(ranks.row_rank)
    rows = shape.micro_batch_rows
    batches = [
        micro_batch(torch.randint(0, config.vocab_size, (rows * 128,), generator=generator), (128,) * rows, None, 2)
        for _ in range(shape.rows // sizes.row_ranks // rows)
    ]
    ranks.backward(
        model,
        batches,
        split=lambda batch: ranks.split(batch, routing=RoutingTape(), balance_weight=0.0, balance_length=None),
        loss=lambda states, part: loss_of_states(
            model, states, part, label_counts=torch.tensor([100] * 3), mtp_weight=0.3
        ),
        seen=lambda context: None,
    )
    counts["kept"] = sum(ranks.local(parameter).numel() for parameter in model.parameters())
    return dict(counts)


def pipeline_options(sizes: MeshSizes) -> PipelineOptions:
    schedule = "1f1b" if sizes.stages_per_rank == 1 else "interleaved"
    return PipelineOptions(schedule, sizes.num_stages, (), STEP.sequence_length)


def all_measured() -> list[dict[str, float]]:
    functions = dict(vars(dist))
    outcomes = []
    for config, sizes, shape in CASES:
        outcomes.append(measured(config, sizes, shape))
        for name in ("all_gather_single", "reduce_scatter_single", "all_reduce", "all_to_all_single"):
            setattr(dist, name, functions[name])
        dist.irecv = distributed_c10d.irecv = functions["irecv"]
    return outcomes


@pytest.mark.slow
def test_bytes_are_those_of_real_processes(tmp_path):
    by_rank = run_processes(tmp_path, 4, all_measured)
    for number, (config, sizes, shape) in enumerate(CASES):
        mean: Counter = Counter()
        for outcomes in by_rank:
            mean.update({kind: value / 4 for kind, value in outcomes[number].items()})
        traffic = plan(config, sizes, shape, CARDS["h100"], efficiency=0.4).traffic
        assert mean["kept"] == kept_parameters(config, sizes, shape.sequence_length), sizes
        # the first exchange of a schedule also agrees on its shapes, in a few bytes
        assert mean["states"] == pytest.approx(traffic.pp, abs=32), sizes
        assert mean["gather"] + mean["scatter"] == pytest.approx(traffic.shard), sizes
        assert mean["reduce"] == pytest.approx(traffic.replicate + traffic.tp), sizes
        # a random router is not even, and the counts of tokens travel as well
        assert mean["exchange"] == pytest.approx(traffic.cp + traffic.ep, rel=0.2 if sizes.ep > 1 else 1e-9), sizes


def test_the_search_sorts_meshes_by_time_and_memory():
    config, step, card = model_config("small"), StepShape(4096, 64, 1), CARDS["h100"]
    every, none = search(config, step, card, num_cards=4, efficiency=0.4)
    assert not none
    limit = sorted(found.memory.total for found in every)[len(every) // 2]
    card = replace(card, memory_bytes=limit / 0.9)
    fitting, others = search(config, step, card, num_cards=4, efficiency=0.4)
    assert fitting and others
    for plans in (fitting, others):
        assert plans == sorted(plans, key=lambda found: found.step_seconds)
    largest, smallest = max(found.memory.total for found in fitting), min(found.memory.total for found in others)
    assert largest < 0.9 * card.memory_bytes <= smallest


@pytest.mark.slow
def test_the_search_finds_meshes_for_the_published_model():
    config, step = model_config("flash_base"), StepShape(32_768, 2048, 1, recompute=True)
    fitting, others = search(config, step, CARDS["h100"], num_cards=256, efficiency=0.4)
    assert fitting and all(found.memory.total < 80e9 for found in fitting)
    assert all(found.memory.total > 70e9 for found in others)
    assert fitting == sorted(fitting, key=lambda found: found.step_seconds)
    assert not search(config, step, CARDS["h100"], num_cards=8, efficiency=0.4)[0]


@pytest.mark.parametrize(
    ("costs", "micro_batches"), [((1, 1), 4), ((1, 1, 1, 1), 8), ((1, 1, 1, 0.5), 8), ((1, 0.8, 1.2, 1), 16)]
)
def test_the_time_of_a_pipeline_is_that_of_its_schedule(costs, micro_batches):
    """1F1B, in which a backward pass takes twice as long as a forward pass."""
    ranks = len(costs)
    left, clock, ended = {}, [0.0] * ranks, {}
    for rank in range(ranks):
        ahead = min(ranks - rank, micro_batches)
        forward = [("forward", number, rank) for number in range(micro_batches)]
        backward = [("backward", number, rank) for number in range(micro_batches)]
        pairs = zip(backward, forward[ahead:], strict=False)
        left[rank] = [*forward[:ahead], *(action for pair in pairs for action in pair), *backward[-ahead:]]
    while any(left.values()):
        for rank, actions in left.items():
            while actions:
                kind, number, _ = actions[0]
                source = ("forward", number, rank - 1) if kind == "forward" else ("backward", number, rank + 1)
                if 0 <= source[2] < ranks and source not in ended:
                    break
                start = max(clock[rank], ended.get(source, 0.0))
                clock[rank] = start + costs[rank] * (1 if kind == "forward" else 2)
                ended[actions.pop(0)] = clock[rank]
    predicted = pipeline_seconds([3 * cost * micro_batches for cost in costs], micro_batches, 1)
    assert (
        max(clock) == pytest.approx(predicted) if len(set(costs)) == 1 else max(clock) <= predicted < 1.05 * max(clock)
    )


def test_meshes_use_every_card():
    found = list(meshes(16, 8, most_stages=8))
    assert len(set(found)) == len(found)
    assert all(sizes.ranks == 16 for sizes in found)
    assert {sizes.num_stages for sizes in found} == {1, 2, 4, 8}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (MeshSizes(dp_shard=3), "8 rows"),
        (MeshSizes(dp_shard=2, ep=2, tp=3), "tp"),
        (MeshSizes(dp_shard=2, ep=4), "ep 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        plan(CONFIG, sizes, STEP, CARDS["h100"], efficiency=0.4)


def _counts(sizes: MeshSizes) -> list[int]:
    return list(dry_run(CONFIG, sizes, recompute=True))


@pytest.mark.parametrize(
    "sizes",
    [
        MeshSizes(dp_shard=4, ep=2), MeshSizes(dp_replicate=2, cp=2, tp=2),
        MeshSizes(dp_shard=2, pp=2, stages_per_rank=2), MeshSizes(dp_shard=2, ep=2, pp=4),
    ],
)  # fmt: skip
def test_a_dry_run_builds_every_rank(sizes):
    with multiprocessing.get_context("fork").Pool(1) as pool:  # torch caches meshes, which later tests would get
        counts = pool.apply(_counts, (sizes,))
    assert len(counts) == sizes.ranks
    assert sum(counts) / len(counts) == pytest.approx(kept_parameters(CONFIG, sizes))


def test_context_parallelism_moves_less_than_gathering_all_keys():
    """Eight ranks and 256K tokens: a halo makes the traffic of sliding layers vanish next to that of full ones."""
    config = model_config("flash_base")
    step = StepShape(262_144, 64, 1)
    moved = plan(config, MeshSizes(dp_shard=8, cp=8), step, CARDS["h100"], efficiency=0.4).traffic.cp / 8 / 2
    specs = [config.attention_place(index).spec for index in range(len(config.attention_layers()))]
    gathered = sum(spec.num_kv_heads * (spec.key_dim + spec.value_dim) for spec in specs) * 262_144 * 7 / 8 * 2
    assert gathered / moved > 9.6


def test_auto_moves_the_fewest_bytes():
    moved = {
        exchange: plan(MANY_KEYS, MeshSizes(cp=4), replace(LONG, cp_exchange=exchange), CARDS["h100"], efficiency=0.4)
        for exchange in ("auto", "keys", "heads")
    }
    assert moved["auto"].traffic.cp == moved["heads"].traffic.cp < moved["keys"].traffic.cp
    few = [
        plan(CONFIG, MeshSizes(cp=4), replace(LONG, cp_exchange=exchange), CARDS["h100"], efficiency=0.4).traffic.cp
        for exchange in ("auto", "keys", "heads")
    ]
    assert few[0] == few[1] < few[2]


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [("tiny_hysparse", MeshSizes(cp=2), "shares its keys"), ("flash_base", MeshSizes(cp=3), "64 heads")],
)
def test_heads_that_cannot_be_exchanged_are_refused_by_name(name, sizes, message):
    step = StepShape(4096, 8, 1, cp_exchange="heads")
    with pytest.raises(ConfigError, match=f"cp_exchange is heads, but attention layer .* {message}"):
        plan(model_config(name), sizes, step, CARDS["h100"], efficiency=0.4)
    plan(model_config(name), sizes, replace(step, cp_exchange="auto"), CARDS["h100"], efficiency=0.4)
