"""The measured tables of docs/performance.md are those of the result files beside it."""

import pytest

from engines.measure.tables import markdown
from scripts.measured import DOCS, measured

PAGE = (DOCS / "performance.md").read_text()


@pytest.mark.parametrize("name", ["2-cores-8-frames", "2-cores-32-frames"])
def test_the_page_has_the_tables_of_the_results(name: str) -> None:
    results = measured()[name]
    assert f"(results/bench-{name}.json)" in PAGE and f"(images/bench-{name}.png)" in PAGE
    assert markdown(results) in PAGE, "python -m scripts.measured prints other tables"


def test_no_result_is_left_out_of_the_page() -> None:
    assert all(f"(results/bench-{name}.json)" in PAGE for name in measured())
