"""Server-sent events, as the HTML standard's section 9.2.6 reads them: bytes in, data of complete events out."""

import codecs
import re

_LINE_END = re.compile(r"\r\n|\r|\n")


class EventParser:
    """Feed it whatever pieces arrive; comments and fields other than `data` are passed over."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        self._rest = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of every event that is complete now; lines of one event are joined by a newline."""
        text = self._rest + self._decode(piece)
        # A carriage return at the end may be half of a line end.
        *lines, self._rest = _LINE_END.split(text[:-1] if text.endswith("\r") else text)
        if text.endswith("\r"):
            self._rest += "\r"
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: str) -> str | None:
        if not line:
            data, self._data = self._data, []
            return "\n".join(data) if data else None
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        return None
