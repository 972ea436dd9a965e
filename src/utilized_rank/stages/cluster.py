"""Where a study's work is done: here, one item after the other, or on a Ray cluster. No result depends on it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tqdm import tqdm

from ..base.runtime import device, processor, start
from ..base.sections import StudyError
from ..networks.each import Each, Item, Result, Shared, Work, in_turn

ENGINE, ADDRESS = "UTILIZED_RANK_ENGINE", "RAY_ADDRESS"
"""Environment variables: which engine, and where its cluster is (``HOST:PORT``), without which this machine is one."""
PATIENCE, RETRIES = 10.0, 3
"""Seconds that an address has to answer; and how often an item is done anew whose worker, or its machine, was lost."""


def engine() -> Each:
    """The engine that the environment names: ``local`` (the default) or ``ray``.

    Raises:
        StudyError: there is none of that name, no cluster, or no room for a task on any of its machines.
    """
    if chosen() == "local":
        return in_turn
    ray, threads = connected(), torch.get_num_threads()
    if not slots(ray, threads):
        raise StudyError(f"{ENGINE}=ray: a task takes {_needs(threads)}; no machine has them: use larger ones")
    return on_ray


def chosen() -> str:
    """Its name."""
    name = os.environ.get(ENGINE) or "local"
    if name not in ("local", "ray"):
        raise StudyError(f"{ENGINE}: there is no engine {name!r} (local, ray)")
    return name


def connected() -> Any:
    """Ray, connected to the cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise StudyError(f"{ENGINE}=ray: Ray is not installed: `pip install 'utilized-rank[cluster]'`") from None
    if ray.is_initialized():
        return ray
    address = os.environ.get(ADDRESS) or "local"
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        if port.isdecimal():  # Ray itself would wait for minutes
            socket.create_connection((host, int(port)), PATIENCE).close()
        ray.init(address, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        # What it prints of machines that come and go would be a part of a notebook, which is a result.
        ray._private.worker._worker_logs_enabled = False
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise StudyError(
            f"{ADDRESS}={address}: no Ray cluster answers ({why}): start it, or mend the address"
        ) from None
    return ray


def on_gpu() -> bool:
    """Whether a task takes a GPU: where this process computes on one, so that all compute alike."""
    return device().type == "cuda"


def slots(ray: Any, threads: int) -> int:
    """How many tasks run at once: one on each GPU, or on so many processors."""
    kind, amount = ("GPU", 1) if on_gpu() else ("CPU", threads)
    return sum(int(node["Resources"].get(kind, 0) // amount) for node in ray.nodes() if node["Alive"])


def on_ray(make: Callable[[Shared], Callable[[Item], Result]], shared: Shared) -> Work[Item, Result]:
    """An :class:`Each` of Ray tasks: what items share is sent once, and each worker makes of it once what does them."""
    import ray

    threads = torch.get_num_threads()
    needs = {"num_gpus": 1} if on_gpu() else {"num_cpus": threads}
    # Workers stay, with what they made: of tasks with a GPU, Ray would end them after each.
    task = ray.remote(max_retries=RETRIES, max_calls=0, **needs)(_done)
    common = [ray.put((make, shared))]  # in a list it is sent as a reference

    def work(items: Mapping[str, Item], title: str, unit: str) -> Iterator[tuple[str, Result]]:
        names = {task.remote(common, threads, item): name for name, item in items.items()}
        waiting = list(names)
        try:
            for _ in tqdm(range(len(items)), desc=title, unit=unit):
                (ready,), waiting = ray.wait(waiting)
                yield names[ready], _result(ray, ready, f"{title}: {unit} {names[ready]}")
        finally:
            for left in waiting:
                ray.cancel(left)

    return work


def _result(ray: Any, ready: Any, what: str) -> Any:
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise StudyError(f"{what} failed: {type(error.cause).__name__}: {_line(error.cause)}") from None
    except ray.exceptions.RayError as error:
        times = f"{RETRIES + 1} times ({_line(error)})"
        raise StudyError(f"{what} was lost with its worker {times}: run the stage again") from None


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]  # Ray appends tracebacks


_made: dict[str, Callable[[Any], Any]] = {}
"""In a worker: what does an item, by the object that it was made of."""


def _done(common: list[Any], threads: int, item: Any) -> Any:
    """In a worker: the result of an item."""
    import ray

    name = common[0].hex()
    if name not in _made:
        _made.clear()
        start(threads, 0, "cluster")
        make, shared = ray.get(common[0])
        _made[name] = make(shared)
    return _made[name](item)


def status(threads: int) -> str:
    """What a study of so many threads would use, one line a machine."""
    if chosen() == "local":
        return f"engine local: one item after the other, on this machine ({processor()}, {os.cpu_count()} processors)"
    ray = connected()
    alive = [(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    machines = [f"{name}: {of.get('CPU', 0):g} processors, {of.get('GPU', 0):g} GPUs" for name, of in alive]
    at_once = f"{slots(ray, threads)} tasks at once, each takes {_needs(threads)}"
    return "\n".join([f"engine ray {ray.__version__}: {at_once}", *machines])


def _needs(threads: int) -> str:
    return "a GPU" if on_gpu() else f"as many processors as the study has threads: {threads}"
