"""Stop strings across token boundaries."""

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until one of `stops` is complete; holds back only what may be the beginning of one.

    Of several stops the one that is complete first wins, so the result does not depend on how the text is cut into pieces; of
    those complete at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """What may be shown now. Once `matched`, nothing more comes."""
        if not self._stops or self.matched:
            return "" if self.matched else text
        self._held += text
        start = self._match_start()
        if start is not None:
            self.matched = True
            return self._take(start, keep="")
        start = self._first_possible_start()
        return self._take(start, keep=self._held[start:])

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        return self._take(len(self._held), keep="")

    def _take(self, end: int, keep: str) -> str:
        shown, self._held = self._held[:end], keep
        return shown

    def _match_start(self) -> int | None:
        ends = [(found + len(stop), found) for stop in self._stops if (found := self._held.find(stop)) >= 0]
        return min(ends)[1] if ends else None

    def _first_possible_start(self) -> int:
        held = self._held
        for start, character in enumerate(held):
            if character in self._first_characters and any(stop.startswith(held[start:]) for stop in self._stops):
                return start
        return len(held)
