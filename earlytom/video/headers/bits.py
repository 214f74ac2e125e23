"""Bits of a header, and the word for what cannot be proved."""

from __future__ import annotations


class Unproven(Exception):
    """Why decoding only a part of a file might not give the frames that decoding all of it gives.

    `decoded`: frames that had been decoded before it turned out.
    """

    def __init__(self, why: str, decoded: int = 0) -> None:
        super().__init__(why)
        self.decoded = decoded


class Bits:
    """Reads unsigned numbers of a fixed length and Exp-Golomb codes (H.264 9.1, HEVC 9.2); Unproven past the end."""

    def __init__(self, data: bytes) -> None:
        self._number, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def u(self, count: int) -> int:
        if count > self._left:
            raise Unproven("a header ends too early")
        self._left -= count
        return self._number >> self._left & (1 << count) - 1

    def ue(self) -> int:
        zeros = 0
        while not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)

    def se(self) -> int:
        code = self.ue()
        return (code + 1) // 2 if code % 2 else -(code // 2)


class Sets:
    """Parameter sets by name: all are there from the first packet on, and none changes after it.

    A decoder keeps them from packet to packet, so that one which begins in the middle would miss what came before.
    Those of the container's configuration may be replaced by the first packet, which is always decoded first.
    """

    def __init__(self) -> None:
        self._configured: dict[object, bytes] = {}
        self._known: dict[object, bytes] = {}
        self._open = True

    def configure(self, name: object, value: bytes) -> None:
        self._configured[name] = value

    def take(self, name: object, value: bytes) -> None:
        """Raises Unproven where the set is new after the first packet, or another one than it was."""
        known = self._known.get(name, None if self._open else self._configured.get(name))
        if known is None and self._open:
            self._known[name] = value
        elif known != value:
            raise Unproven("the stream's parameters change on the way")

    def close(self) -> None:
        """The first packet is over."""
        self._open = False
