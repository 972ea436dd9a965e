"""Where work is done changes nothing: here, or on a Ray cluster of two nodes on this machine, one of which is lost."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from conftest import toy_dataset
from torch import Tensor, nn

from utilized_rank.base.journal import Answers, Journal
from utilized_rank.base.sections import StudyError
from utilized_rank.networks.each import Each, Work, in_turn
from utilized_rank.networks.evaluation import Labelled
from utilized_rank.ranks import moments
from utilized_rank.ranks.measure import Measurement, measure
from utilized_rank.stages import cluster, teams
from utilized_rank.training import loop, team


@pytest.fixture
def environment(monkeypatch) -> pytest.MonkeyPatch:
    """No engine and no address is named."""
    monkeypatch.delenv(cluster.ENGINE, raising=False)
    monkeypatch.delenv(cluster.ADDRESS, raising=False)
    return monkeypatch


def squares(base: int) -> Callable[[int], int]:
    return lambda item: base + item**2


def test_a_loop_is_the_engine_unless_another_is_named(environment):
    assert cluster.engine() is in_turn
    assert cluster.status(2).startswith("engine local: ")
    assert list(cluster.engine()(squares, 1)({"b": 3, "a": 2}, "squares", "number")) == [("b", 10), ("a", 5)]


def test_an_engine_that_does_not_exist_is_named(environment):
    environment.setenv(cluster.ENGINE, "slurm")
    with pytest.raises(StudyError, match=r"^UTILIZED_RANK_ENGINE: there is no engine 'slurm' \(local, ray\)$"):
        cluster.engine()


def test_without_ray_it_is_said_what_to_install(environment):
    environment.setenv(cluster.ENGINE, "ray")
    environment.setitem(sys.modules, "ray", None)
    with pytest.raises(StudyError, match=r"^UTILIZED_RANK_ENGINE=ray: .* `pip install 'utilized-rank\[cluster\]'`$"):
        cluster.engine()


def test_two_modules_know_ray():
    package = Path(cluster.__file__).parents[1]
    knowing = {path.name for path in package.rglob("*.py") if re.search(r"(import|from) ray\b", path.read_text())}
    assert knowing == {"cluster.py", "teams.py"}


NODE = {"num_cpus": 1, "object_store_memory": 2**28}


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster of one node with one processor."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # for what is defined here
        its = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        yield its
        ray.shutdown()
        its.shutdown()


@pytest.fixture
def one(head, environment) -> Each:
    """The engine on the first node."""
    torch.set_num_threads(1)
    environment.setenv(cluster.ENGINE, "ray")
    environment.setenv(cluster.ADDRESS, head.address)
    return cluster.engine()


@pytest.fixture
def second(head) -> Iterator[Any]:
    """Another node beside it."""
    node = head.add_node(**NODE)
    head.wait_for_nodes()
    yield node
    if node in head.worker_nodes:
        head.remove_node(node)


@pytest.fixture
def lose(head, second) -> Callable[[], None]:
    """Ends the second node and all that runs on it, at once, as a power cut does."""

    def lose() -> None:
        if second in head.worker_nodes:
            for worker in psutil.Process(second.all_processes["raylet"][0].process.pid).children(recursive=True):
                worker.kill()
            head.remove_node(second, allow_graceful=False)

    return lose


WHILE = 0.5
"""Seconds that an item takes, at least."""


def noting(given: tuple[Callable[[Any], Callable[[Any], Any]], Any, Path]) -> Callable[[Any], Any]:
    """Does what another one does, says in a folder who made and who began what, and takes a while."""
    make, shared, folder = given
    do = make(shared)
    with (folder / f"made in {os.getpid()}").open("a") as file:
        file.write("once\n")

    def noted(item: Any) -> Any:
        with (folder / f"item {getattr(item, 'name', item)}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(WHILE)
        return do(item)

    return noted


def noted(each: Each, folder: Path) -> Each:
    """The same engine, with notes of what it does."""
    return lambda make, shared: each(noting, (make, shared, folder))


ITEMS = {f"{i}": i for i in range(8)}


def begun(folder: Path) -> list[list[str]]:
    """The workers that began each item."""
    return [path.read_text().split() for path in folder.glob("item *")]


def workers(folder: Path) -> set[str]:
    return {worker for its in begun(folder) for worker in its}


def losing(each: Each, folder: Path, lose: Callable[[], None], during: str) -> Each:
    """The same engine with notes; something is lost as soon as both nodes are in the middle of such an item."""
    done: list[str] = []

    def maker(make: Any, shared: Any) -> Work[Any, Any]:
        work = noted(each, folder)(make, shared)

        def losing_work(items: Mapping[str, Any], title: str, unit: str) -> Iterator[tuple[str, Any]]:
            for found in work(items, title, unit):
                done.append(found[0])
                time.sleep(WHILE / 2)  # until the next has begun
                if title == during and sum(map(len, begun(folder))) == len(done) + 2:
                    lose()
                yield found

        return losing_work

    return maker


@pytest.fixture
def both(one, second, tmp_path) -> Path:
    """A folder in which :func:`noting` has noted that both nodes have a worker by now."""
    deadline = time.monotonic() + 60
    while len(workers(tmp_path)) < 2:
        assert time.monotonic() < deadline
        list(noted(one, tmp_path)(squares, 0)(ITEMS, "numbers", "number"))
    for path in tmp_path.iterdir():
        path.unlink()
    return tmp_path


@pytest.mark.cluster
def test_what_items_share_is_made_once_in_a_worker(one, both):
    work = noted(one, both)(squares, 1)
    for _ in range(2):
        assert dict(work(ITEMS, "squares", "number")) == {name: 1 + i**2 for name, i in ITEMS.items()}
    made = {path.name: path.read_text() for path in both.glob("made in *")}
    assert made == {f"made in {worker}": "once\n" for worker in workers(both)}


@pytest.mark.cluster
def test_what_a_lost_node_had_begun_is_done_on_another(one, second, lose, head, both, capsys):
    work = losing(one, both, lose, "squares")(squares, 1)
    assert dict(work(ITEMS, "squares", "number")) == {name: 1 + i**2 for name, i in ITEMS.items()}
    assert second not in head.worker_nodes
    assert sorted(map(len, begun(both))) == [1] * 7 + [2]
    assert capsys.readouterr().out == ""  # a notebook would keep it


def dying(folder: Path) -> Callable[[int], int]:
    """What ends its worker the first time, as one does that has no memory left."""

    def do(item: int) -> int:
        if not (folder / "died").exists():
            (folder / "died").write_text("")
            os._exit(1)
        return item

    return do


@pytest.mark.cluster
def test_an_item_whose_worker_dies_is_done_again(one, tmp_path):
    assert dict(one(dying, tmp_path)({"a": 1, "b": 2}, "numbers", "number")) == {"a": 1, "b": 2}
    assert (tmp_path / "died").exists()


def always_dying(_: None) -> Callable[[int], int]:
    return lambda item: os._exit(1)


@pytest.mark.cluster
def test_an_item_whose_worker_always_dies_is_named(one, environment):
    environment.setattr(cluster, "RETRIES", 1)
    with pytest.raises(StudyError, match=r"^rank search: layer conv1 was lost with its worker 2 times .*") as said:
        list(one(always_dying, None)({"conv1": 1}, "rank search", "layer"))
    assert "\n" not in str(said.value)


def refusing(wrong: int) -> Callable[[int], int]:
    def do(item: int) -> int:
        if item == wrong:
            raise ValueError("no such number")
        return item

    return do


@pytest.mark.cluster
def test_an_item_that_fails_is_named(one):
    with pytest.raises(StudyError, match=r"^rank search: layer conv2 failed: ValueError: no such number$"):
        list(one(refusing, 2)({"conv1": 1, "conv2": 2, "conv3": 3}, "rank search", "layer"))


@pytest.mark.cluster
def test_what_would_be_used_is_said_machine_by_machine(one, second):
    first, *machines = cluster.status(1).splitlines()
    assert first.endswith("2 tasks at once, each takes as many processors as the study has threads: 1")
    assert len(machines) == 2


@pytest.mark.cluster
def test_a_study_with_more_threads_than_any_machine_has_is_refused(one):
    torch.set_num_threads(3)
    with pytest.raises(StudyError, match="threads: 3; no machine has them"):
        cluster.engine()


@pytest.mark.cluster
def test_an_address_where_nobody_listens_is_named_soon(environment):
    import ray

    ray.shutdown()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        environment.setenv(cluster.ENGINE, "ray")
        environment.setenv(cluster.ADDRESS, address)
        began = time.perf_counter()
        with pytest.raises(StudyError, match=rf"^RAY_ADDRESS={address}: no Ray cluster answers") as said:
            cluster.engine()
    assert time.perf_counter() - began < 15
    assert "\n" not in str(said.value)


@pytest.fixture(autouse=True)
def chunks(monkeypatch) -> None:
    """Eight chunks of the 70 images."""
    monkeypatch.setattr(moments, "CHUNK", 9)


def searched(network: nn.Module, images: Tensor, each: Each, **how: Any) -> Measurement:
    labels = torch.arange(len(images)) % 5
    return measure(network, Labelled(images, labels), images, [0.0, 20.0], precision="float32", each=each, **how)


def same(one: Measurement, other: Measurement) -> None:
    pd.testing.assert_frame_equal(one.layers, other.layers)
    pd.testing.assert_frame_equal(*(its.evaluations.drop(columns="seconds") for its in (one, other)))
    for name, its in one.moments.items():
        assert torch.equal(its.products, other.moments[name].products)
        assert torch.equal(its.total, other.moments[name].total)
    assert (one.score, one.precision, one.thresholds) == (other.score, other.precision, other.thresholds)


@pytest.mark.cluster
@pytest.mark.parametrize("criterion", ["rank", "predicted"])
@pytest.mark.parametrize("name", ["residual", "vit"])
def test_ranks_and_evaluations_are_those_of_a_loop(make, images, one, name, criterion):
    network = make(name)
    same(*(searched(network, images, each, criterion=criterion) for each in (in_turn, one)))


@pytest.mark.cluster
def test_a_search_that_loses_a_node_finds_what_a_loop_finds(make, images, one, second, lose, head, both):
    """What was on it is begun twice."""
    network = make("resnet20")
    found = searched(network, images, losing(one, both, lose, "rank search"))
    assert second not in head.worker_nodes
    times = sorted(len((both / f"item {name}").read_text().split()) for name in found.layers.layer.unique())
    assert times == [1] * (len(times) - 1) + [2]
    same(searched(network, images, in_turn), found)


class Interrupted(Exception):
    pass


@pytest.mark.cluster
def test_what_was_done_is_kept_when_a_search_is_interrupted(make, images, one, tmp_path):
    network, kept = make("residual"), Journal(tmp_path)
    done: list[str] = []

    def interrupt(rows: list[dict[str, Any]]) -> None:
        done.append(rows[0]["layer"])
        if len(done) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        searched(network, images, one, recall=Answers(kept, "search"), on_layer=interrupt)
    known = Answers(kept, "search")
    asked: list[str] = []

    def recalled(question: Any, work_out: Callable[[], Any]) -> Any:
        return known(question, lambda: (asked.append(question[0]), work_out())[1])

    again = searched(network, images, in_turn, recall=recalled)
    assert asked
    assert not {*done} & {*asked}
    same(searched(network, images, in_turn), again)


@pytest.mark.cluster
def test_a_team_on_two_nodes_takes_the_steps_of_one_process(one, second, capsys):
    """In the first epoch, and without batch norm, which sees a part of a batch alone."""
    from test_team import RECIPE, network, seeded

    how = RECIPE.model_copy(update={"method": "supervised"})
    found = []
    for together in (team.alone, teams.engine()):
        trained = network()
        curve = loop.train(trained, toy_dataset(), how, seeded(), "float32", "toy", together=together)
        found.append((trained.state_dict(), curve.loss.tolist()))
    torch.testing.assert_close(*(dict(weights) for weights, _ in found))
    assert found[0][1] == pytest.approx(found[1][1])
    assert capsys.readouterr().out == ""


@pytest.mark.cluster
def test_a_training_that_fails_in_a_team_says_why(one, second):
    with pytest.raises(StudyError, match=r"^training in 2 processes failed: .*no such number$") as said:
        teams.engine()(partial(refusing(2), 2), 4)
    assert "\n" not in str(said.value)


@pytest.mark.cluster
def test_a_team_is_of_as_many_as_a_batch_has_equal_parts_for(one, second):
    assert teams.engine()(team.size, 3) == 1
    assert teams.engine()(team.size, 4) == 2
