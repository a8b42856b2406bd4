"""A simulation for the data scheduler: slots that write one token per tick, and scoring that takes time."""

import json
import math
import random
import tempfile
from dataclasses import replace
from pathlib import Path

from openmimo.core.sample_files import read_state, write_state
from openmimo.core.samples import Sample
from openmimo.rl.config import SchedulerConfig, SourceQuota
from openmimo.rl.scheduling.problems import Problem
from openmimo.rl.scheduling.scheduler import DataScheduler


def endless(name):
    """A stream in which every problem is new."""
    return lambda index: Problem(f"{name}-{index}")


def round_robin(name, num_problems):
    """A stream that repeats a finite set of problems in order."""
    return lambda index: Problem(f"{name}-{index % num_problems}")


def make_config(**changes):
    """Two sources that share a small batch."""
    sources = (
        SourceQuota("math", quota=5, samples_per_prompt=4),
        SourceQuota("code", quota=3, samples_per_prompt=2, priority=1),
    )
    return replace(SchedulerConfig(sources, groups_per_step=8), **changes)


def make_scheduler(config, streams=None):
    return DataScheduler(config, streams or {source.name: endless(source.name) for source in config.sources})


class World:
    """Runs the requests of a scheduler in simulated time.

    Length and reward of an answer are functions of its sample id and the seed, so they do not depend on when it runs.
    """

    def __init__(
        self, scheduler, *, slots=24, seed=0, pass_rate=0.5, error_rate=0.0, reward_delay=0.0, interrupt=True,
        resume_streams=None,
    ):  # fmt: skip
        self.scheduler, self.slots, self.seed = scheduler, slots, seed
        self.pass_rate, self.error_rate, self.reward_delay = pass_rate, error_rate, reward_delay
        self.interrupt = interrupt
        self.resume_streams = resume_streams
        self.now, self.version, self.num_events, self.num_orders = 0.0, 0, 0, 0
        self.jobs, self.rewards, self.attempts = {}, {}, {}
        self.requests, self.submitted = [], []

    def chance(self, *names):
        return random.Random("/".join(map(str, (self.seed, *names))))

    def length(self, sample_id):
        return max(1, min(400, round(math.exp(self.chance("length", sample_id).gauss(3.0, 1.0)))))

    def reward(self, sample_id, problem_id):
        rate = self.pass_rate(problem_id) if callable(self.pass_rate) else self.pass_rate
        return float(self.chance("reward", sample_id).random() < rate)

    def begin_step(self, version):
        """Starts a step with new weights; in `interrupt` mode, all unfinished samples return to the scheduler as
        partials.
        """
        for sample_id, job in list(self.jobs.items()):
            done = min(int(self.now - job["start"]), job["left"])
            job["versions"] += [self.version] * done
            job["left"] -= done
            job["start"] = self.now
            if self.interrupt:
                del self.jobs[sample_id]
                self.scheduler.on_partial(job["group_id"], self.sample(sample_id, job, finish_reason=""))
        self.version = version
        self.scheduler.begin_step(version)
        self.after_call()

    def step(self, version):
        """Runs one step. Returns its batch and its report."""
        self.begin_step(version)
        while not self.scheduler.is_complete():
            self.submit()
            if self.jobs or self.rewards:
                self.next_event()
            else:
                assert self.scheduler.is_complete(), "nothing runs and nothing is submitted"
            self.after_call()
        taken = self.scheduler.take_batch()
        self.cancel()
        self.after_call()
        return taken

    def submit(self):
        free = max(0, self.slots - len(self.jobs))  # samples in scoring at a crash run again
        requests = self.scheduler.next_submissions(free)
        self.after_call()
        assert sum(len(request.sample_ids) for request in requests) <= free
        for request in requests:
            self.start(request)
        self.requests += requests
        self.cancel()

    def start(self, request):
        for sample_id in request.sample_ids:
            assert sample_id not in self.jobs
            partial = request.partials.get(sample_id)
            versions = [] if partial is None else partial.versions[1:].tolist()
            self.submitted.append(sample_id)
            self.num_orders += 1
            self.jobs[sample_id] = {
                "group_id": request.group_id, "problem": request.problem, "start": self.now, "versions": versions,
                "left": self.length(sample_id) - len(versions), "order": self.num_orders,
            }  # fmt: skip

    def cancel(self):
        for sample_id in self.scheduler.take_cancelled():
            self.jobs.pop(sample_id, None)
            self.rewards.pop(sample_id, None)

    def next_event(self):
        """Advances to the next event: an answer ends, or a reward arrives."""
        events = [(job["start"] + job["left"], job["order"], key) for key, job in self.jobs.items()]
        events += [(when, order, key) for key, (when, order, _) in self.rewards.items()]
        self.now, _, sample_id = min(events)
        self.num_events += 1
        if sample_id in self.rewards:
            self.scheduler.on_sample(*self.rewards.pop(sample_id)[2])
        else:
            self.finish(sample_id, self.jobs.pop(sample_id))

    def finish(self, sample_id, job):
        attempt = self.attempts[sample_id] = self.attempts.get(sample_id, 0) + 1
        if self.chance("error", sample_id, attempt).random() < self.error_rate:
            self.scheduler.on_sample(job["group_id"], self.sample(sample_id, job, finish_reason="error"))
            return
        job["versions"] += [self.version] * job["left"]
        sample = self.sample(sample_id, job, finish_reason="stop")
        sample.reward = self.reward(sample_id, job["problem"].id)
        delay = self.chance("delay", sample_id).random() * self.reward_delay
        if delay:
            self.num_orders += 1
            self.rewards[sample_id] = (self.now + delay, self.num_orders, (job["group_id"], sample))
        else:
            self.scheduler.on_sample(job["group_id"], sample)

    def sample(self, sample_id, job, finish_reason):
        versions = list(job["versions"])
        return Sample(
            token_ids=[1] + [2] * len(versions),
            loss_mask=[False] + [True] * len(versions),
            logprobs=[0.0] + [-0.5] * len(versions),
            versions=[-1] + versions,
            finish_reason=finish_reason,
            info={"sample_id": sample_id, "problem_id": job["problem"].id},
        )

    def after_call(self):
        """With `resume_streams`, saves the scheduler and loads it into a new one after every call."""
        if self.resume_streams is not None:
            self.scheduler = resumed(self.scheduler, self.resume_streams)


def resumed(scheduler, streams):
    """Returns a new scheduler with the saved state of another."""
    state = through_files(scheduler.state())
    copy = DataScheduler(scheduler._config, streams)
    copy.load_state(state)
    assert copy.state() == scheduler.state()
    return copy


def through_files(state):
    """Returns a state after a round trip through files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.arrays"
        plain = json.dumps(write_state(state, path), allow_nan=False)
        return read_state(json.loads(plain), path)


def sample_ids(batch):
    return [sample.info["sample_id"] for group in batch for sample in group]
