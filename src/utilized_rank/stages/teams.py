"""Which processes train a study's network together: this one alone, or a team on the Ray cluster, made by Ray Train."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..base.journal import random_state, restore_random_state
from ..base.runtime import start
from ..base.sections import StudyError
from ..training import team
from ..training.team import Result, Together
from . import cluster


def engine() -> Together:
    """Of the engine that the environment names.

    Raises:
        StudyError: as :func:`utilized_rank.stages.cluster.engine`.
    """
    cluster.engine()
    return team.alone if cluster.chosen() == "local" else on_ray


def on_ray(work: Callable[[], Result], batch_size: int) -> Result:
    """A :class:`Together` of as many processes as there is room for and a batch has equal parts."""
    ray, threads = cluster.connected(), torch.get_num_threads()
    room = cluster.slots(ray, threads)
    count = max(size for size in range(1, room + 1) if batch_size % size == 0)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    results = ray.remote(num_cpus=0)(_Results).remote()
    # In lists, what is large is sent as a reference.
    config = {"common": [ray.put((work, random_state(torch.Generator())))], "results": results, "threads": threads}
    needs = {"GPU": 1} if cluster.on_gpu() else {"CPU": threads}
    scaling = ScalingConfig(num_workers=count, use_gpu=cluster.on_gpu(), resources_per_worker=needs)
    with tempfile.TemporaryDirectory() as folder:  # Ray's own notes: progress is kept by the journal
        how = RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=cluster.RETRIES))
        try:
            TorchTrainer(_in_team, train_loop_config=config, scaling_config=scaling, run_config=how).fit()
        except ray.train.TrainingFailedError as error:
            raise StudyError(f"training in {count} processes failed: {_cause(error)}") from None
    result: Result = ray.get(results.first.remote())
    return result


class _Results:
    """Keeps what the first process gives until it is fetched."""

    def keep(self, result: Any) -> None:
        self.result = result

    def first(self) -> Any:
        return self.result


def _in_team(config: dict[str, Any]) -> None:
    """In each process of the team."""
    import ray

    start(config["threads"], 0, "team")
    work, state = ray.get(config["common"][0])
    restore_random_state(state, torch.Generator())
    result = tree_map_only(Tensor, Tensor.cpu, work())
    if team.rank() == 0:
        ray.get(config["results"].keep.remote(result))


def _cause(error: Any) -> str:
    failures = getattr(error, "worker_failures", {}) or {0: error}
    first = failures[min(failures)]
    return str(getattr(first, "cause", first)).strip().rpartition("\n")[2]
