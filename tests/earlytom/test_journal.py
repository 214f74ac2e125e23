"""Results as lines of a file: taken up again, a line that was cut off left out, other work refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from earlytom.errors import ConfigError
from earlytom.journal import Journal


def read(line: dict[str, Any]) -> int:
    return int(line["n"])


def open_journal(path: Path, key: str = "this") -> Journal[int]:
    return Journal(path, key, of="sum", holds="numbers", write=lambda n: {"n": n}, read=read)


def test_results_are_taken_up_again_wherever_writing_stopped(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    journal = open_journal(path)
    assert journal.done == []
    journal.add([1, 2])
    journal.add([3])
    whole = path.read_bytes()
    assert open_journal(path).done == [1, 2, 3]
    head = whole.index(b"\n") + 1
    for cut in range(head, len(whole) + 1):
        path.write_bytes(whole[:cut])
        known = open_journal(path).done
        assert known == [1, 2, 3][: len(known)] and len(known) >= whole[head:cut].count(b"\n")
        open_journal(path).add([9])
        assert open_journal(path).done == [*known, 9]


def test_other_work_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    open_journal(path)
    with pytest.raises(ConfigError, match="holds numbers of another sum"):
        open_journal(path, "that")
    path.write_text('{"something": "else"}\n')
    with pytest.raises(ConfigError, match="is no file of numbers"):
        open_journal(path)
    for wrong in (tmp_path, tmp_path / "no" / "kept.jsonl"):
        with pytest.raises(ConfigError, match="the file of numbers"):
            open_journal(wrong)
