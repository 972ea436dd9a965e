"""Work on items that do not depend on one another: done in turn here, or wherever an engine of the caller does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from tqdm import tqdm

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")
Given = TypeVar("Given", contravariant=True)
Made = TypeVar("Made", covariant=True)


class Work(Protocol[Given, Made]):
    """Does each of some items, by name."""

    def __call__(self, items: Mapping[str, Given], title: str, unit: str) -> Iterator[tuple[str, Made]]:
        """The result of each with its name, as soon as it is there; progress is told under a title, in units."""


class Each(Protocol):
    """An engine: where work is done, which no result may depend on."""

    def __call__(self, make: Callable[[Shared], Callable[[Item], Result]], shared: Shared) -> Work[Item, Result]:
        """How items are done.

        Args:
            make: from what all items share, makes what does one: a pure function, but for what it keeps to be sooner.
                It is called once wherever items are done.
            shared: never changed.
        """


def in_turn(make: Callable[[Shared], Callable[[Item], Result]], shared: Shared) -> Work[Item, Result]:
    """An :class:`Each` that is a loop."""
    do = make(shared)

    def work(items: Mapping[str, Item], title: str, unit: str) -> Iterator[tuple[str, Result]]:
        for name, item in tqdm(items.items(), desc=title, unit=unit):
            yield name, do(item)

    return work


def ordered(results: Iterable[tuple[str, Result]], names: Iterable[str]) -> Iterator[Result]:
    """Results in the order of ``names``, each as soon as those before it are there."""
    there: dict[str, Result] = {}
    coming = iter(results)
    for name in names:
        while name not in there:
            there |= [next(coming)]
        yield there.pop(name)
