"""The demo answers from what is kept, and less well when the choice of what is kept is broken on purpose."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import earlytom
from earlytom import tower
from earlytom.demo.evaluate import Row, evaluate
from earlytom.demo.methods import make_rows
from earlytom.demo.report import Report
from earlytom.demo.suite import make_suite

SEED = 20  # one that no setting was chosen by
# Of 100 questions, an eighth of them for a sentence, which is seldom right word by word; of the others chance is a
# quarter, or an eighth and less if open. Measured on clips of 16 frames: 82 % are right; 34 % with the least attended
# patches, 47 % merged across cuts.
LEAST = 0.65

least_attended = tower.select_positions


def keep_least_attended(received: Tensor, dynamic: Tensor, keep: int) -> Tensor:
    return least_attended(-received, dynamic, keep)


def merge_across_cuts(similarity: Tensor, *, budget: int, **segmenting: Any) -> Tensor:
    """A plan that takes no notice of what is alike: frames far apart are averaged, whatever lies between."""
    mine = torch.arange(similarity.shape[-1]) % budget == torch.arange(budget)[:, None]
    return (mine / mine.sum(1, keepdim=True)).float().expand(len(similarity), -1, -1)


@pytest.fixture(scope="module")
def report() -> Report:
    model = earlytom.load("demo")
    suite = make_suite(100, seed=SEED, form="both", frames=16)
    rows = make_rows(model, methods=("static",), retain=(0.1,), frames=16, seed=SEED)
    static = rows[-1]

    def broken(name: str, attribute: str, wrong: Any) -> Row:
        def run(frames: Tensor) -> Any:
            with mock.patch.object(tower, attribute, wrong):
                return static.tower(frames)

        return Row(name, run)

    return evaluate(model, suite, [
        *rows,
        broken("least attended", "select_positions", keep_least_attended),
        broken("across cuts", "plan", merge_across_cuts),
    ])


def test_what_is_kept_carries_the_answers(report: Report) -> None:
    assert report.accuracy(report.row("static r=0.1")).value >= LEAST


@pytest.mark.parametrize("name", ["least attended", "across cuts"])
def test_a_broken_choice_would_be_noticed(report: Report, name: str) -> None:
    """Of what is kept, or of what is merged: the test above would fail."""
    assert report.accuracy(report.row(name)).value < LEAST
