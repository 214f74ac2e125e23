"""The measured tables of docs/performance.md are those of the result files beside it."""

import pytest

from scripts.measured import RESULTS, measured

PAGE = (RESULTS.parent / "performance.md").read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.glob("bench-*.json")))
def test_the_page_has_the_tables_of_each_result(name: str) -> None:
    assert f"(results/{name})" in PAGE and measured()[name] in PAGE, "python -m scripts.measured prints other tables"


def test_there_are_results() -> None:
    assert list(RESULTS.glob("bench-*.json"))
