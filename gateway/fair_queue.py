"""Waiting requests in classes by size; each class gets an equal share of the tokens that are let in. Pure policy."""

from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Waiting(Generic[T]):
    """One that waits, with whatever its owner wants to find it by."""

    num_tokens: int
    item: T

    @property
    def size_class(self) -> int:
        return size_class(self.num_tokens)


def size_class(num_tokens: int) -> int:
    """Sizes within a factor of four are one class; a larger class holds larger sizes."""
    return num_tokens.bit_length() // 2


@dataclass
class _Class(Generic[T]):
    """`served` counts the tokens let in, on a scale on which all classes that have somebody waiting can be compared."""

    served: int = 0
    waiting: deque[Waiting[T]] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """Within a class first come, first served. Between classes the one that has had least comes next.

    So a flood of long prompts delays a short one by at most about one of them, and a flood of short ones does not starve the long.
    """

    def __init__(self) -> None:
        self._classes: dict[int, _Class[T]] = {}
        self._served = 0
        self.num_waiting = 0
        self.num_tokens = 0

    def push(self, waiting: Waiting[T]) -> None:
        mine = self._classes.setdefault(waiting.size_class, _Class())
        if not mine.waiting:
            mine.served = max(mine.served, self._served)  # having wanted nothing gives no claim
        mine.waiting.append(waiting)
        self._count(waiting, 1)

    def heads(self) -> list[Waiting[T]]:
        """The first of each class, in the order of their turns."""
        wanting = [each for each in self._classes.values() if each.waiting]
        wanting.sort(key=lambda each: (each.served, each.waiting[0].num_tokens))
        return [each.waiting[0] for each in wanting]

    def take(self, head: Waiting[T]) -> None:
        """One of the `heads` is let in."""
        chosen = self._classes[head.size_class]
        self._served = max(self._served, chosen.served)
        chosen.waiting.popleft()
        chosen.served += max(head.num_tokens, 1)
        self._count(head, -1)

    def remove(self, waiting: Waiting[T]) -> bool:
        """Whether it was still there."""
        mine = self._classes.get(waiting.size_class)
        if mine is None or waiting not in mine.waiting:
            return False
        mine.waiting.remove(waiting)
        self._count(waiting, -1)
        return True

    def ahead_of(self, newcomer: Waiting[T]) -> tuple[int, int]:
        """About how many would be let in before a newcomer, and their tokens: all of its class, and of each other class as many as
        get as much."""
        mine = self._classes.get(newcomer.size_class)
        before = [each.num_tokens for each in mine.waiting] if mine is not None else []
        tokens = sum(before) + newcomer.num_tokens
        for size_class, other in self._classes.items():
            if size_class != newcomer.size_class:
                sizes = [each.num_tokens for each in other.waiting]
                before += [size for size, so_far in zip(sizes, accumulate(sizes), strict=True) if so_far <= tokens]
        return len(before), sum(before)

    def _count(self, waiting: Waiting[T], sign: int) -> None:
        self.num_waiting += sign
        self.num_tokens += sign * waiting.num_tokens
