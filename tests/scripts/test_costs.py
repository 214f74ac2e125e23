"""The tables of docs/performance.md are what the code counts."""

from pathlib import Path

import pytest

from scripts.costs import Section, sections

PAGE = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.title[:20])
def test_the_page_has_each_table_as_it_is_counted_now(section: Section) -> None:
    assert f"{section.title}\n\n{section.table}\n" in PAGE, f"python -m scripts.costs prints another: {section.title}"
