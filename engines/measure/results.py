"""What was measured, as it is kept in a file: every round of every span, and what it was measured on. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from earlytom.errors import InputError
from earlytom.files import replacing

from .settings import EAGER, SDPA, Settings
from .spread import Timing, ratio

SCHEMA = 1
GENERATION = "generation"  # of the tokens after the first: the one span that is not of the time to the first token
VISION = "vision"  # and every span whose name begins with it


@dataclass(frozen=True)
class Span:
    """Milliseconds of one part of a run in each round."""

    name: str
    milliseconds: tuple[float, ...]

    @property
    def timing(self) -> Timing:
        return Timing.of(self.milliseconds)


@dataclass(frozen=True)
class Row:
    """One contestant, with inner merging or without, or asked a second question.

    spans: end to end, in order. visual_tokens: that reach the LLM, newlines included, of one video; prompt_tokens:
    those and the text; ids: of the answer. memory_bytes: of a run on top of what is held, None where it cannot be told;
    engine_bytes: that an engine says it holds by itself. vision_flops (a multiply-add is two) and prefill_flops (of the
    visual tokens, by the paper's formula, in which it is one): None where they are not known. frames: left after each
    merge layer, () where that is not known.
    """

    name: str
    contestant: str
    what: str
    spans: tuple[Span, ...]
    inner: bool = False
    second_question: bool = False
    visual_tokens: int = 0
    prompt_tokens: int = 0
    ids: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()
    memory_bytes: int | None = None
    engine_bytes: int | None = None
    vision_flops: int | None = None
    prefill_flops: int | None = None

    def milliseconds(self, name: str) -> tuple[float, ...] | None:
        """Of each round: of a span, "vision" for all of its stages, "ttft" for all up to the first token."""
        chosen = [span.milliseconds for span in self.spans if self._counts(span.name, name)]
        return tuple(map(sum, zip(*chosen, strict=True))) if chosen else None

    @staticmethod
    def _counts(span: str, name: str) -> bool:
        if name == "ttft":
            return span != GENERATION
        return span.startswith(VISION) if name == VISION else span == name

    @property
    def ttft(self) -> Timing:
        return Timing.of(self.milliseconds("ttft") or ())

    @property
    def tokens_per_second(self) -> Timing | None:
        """Of the tokens after the first; None when there are none."""
        took = self.milliseconds(GENERATION)
        return Timing.of([1000 * (len(self.ids) - 1) / t for t in took]) if took and len(self.ids) > 1 else None


@dataclass(frozen=True)
class NotRun:
    """A contestant that could not take part, and why, in one sentence."""

    name: str
    why: str


@dataclass(frozen=True)
class Results:
    """Everything of one measurement.

    model: what was measured, for people; device: of PyTorch's part; dtype: of the towers; attention: of the LLM;
    machine, clocks: plain JSON of machine.py; version: of this package; commit: of its checkout, "" outside of one.
    """

    settings: Settings
    model: str
    rows: tuple[Row, ...]
    not_run: tuple[NotRun, ...] = ()
    device: str = "cpu"
    dtype: str = ""
    language_dtype: str = ""
    attention: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    clocks: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    commit: str = ""

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def base(self) -> Row:
        """What the others are held against: full tokens, by SDPA where that ran, else the first row."""
        return self.row(SDPA) or self.row(EAGER) or self.rows[0]

    def to_json(self) -> str:
        """Raw milliseconds, and beside them, for readers, what they come to."""
        content = asdict(self) | {"settings": self.settings.to_dict()}
        rows = [
            asdict(row) | {
                "ttft": row.ttft.to_dict(),
                "speedup": round(speedup(self.base, row, "ttft") or 0.0, 4),
                "tokens_per_second": round(rate.median, 4) if (rate := row.tokens_per_second) else None,
                "spans": [
                    {"name": span.name, "milliseconds": list(span.milliseconds),
                     **span.timing.to_dict()} for span in row.spans
                ],
            }
            for row in self.rows
        ]
        return json.dumps({"schema": SCHEMA, **content, "base": self.base.name, "rows": rows}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "the results") -> Results:
        """What `to_json` gave. Raises InputError."""
        try:
            content = json.loads(text)
            if content["schema"] != SCHEMA:
                raise InputError(f"{where} has schema {content['schema']}, this program knows {SCHEMA}")
            rows = tuple(
                _known(Row, row, spans=tuple(Span(s["name"], tuple(s["milliseconds"])) for s in row["spans"]),
                       ids=tuple(row["ids"]), frames=tuple(row["frames"]))
                for row in content["rows"]
            )
            return _known(
                cls, content, rows=rows, not_run=tuple(_known(NotRun, entry) for entry in content["not_run"]),
                settings=_known(
                    Settings, content["settings"], contestants=tuple(content["settings"]["contestants"])
                ),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{where} is not what earlytom-bench --output writes") from None

    @classmethod
    def read(cls, path: Path) -> Results:
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeError) as error:
            raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def speedup(base: Row, row: Row, name: str) -> float | None:
    """How many times as fast as `base` a row is, round by round, in a span (see Row.milliseconds), or None."""
    slower, faster = base.milliseconds(name), row.milliseconds(name)
    if slower is None or faster is None or len(slower) != len(faster) or not all(faster):
        return None
    return ratio(slower, faster)


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all. Raises InputError."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def _known(kind: Any, values: Mapping[str, Any], **changes: Any) -> Any:
    """A dataclass of those of `values` that it has fields for, what is derived left out."""
    names = {f.name for f in fields(kind)}
    return kind(**({name: value for name, value in values.items() if name in names} | changes))
