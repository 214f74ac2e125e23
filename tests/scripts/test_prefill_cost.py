"""The cost of inner merging, and of later questions, can be measured."""

import math

from earlytom.config import InnerMerging
from scripts.prefill_cost import main, merging_cost, question_costs


def test_a_share_is_what_the_parts_make_of_it():
    cost = merging_cost(896, 40, InnerMerging(18, 0.5), turns=1, small=64)
    whole = 18 * cost.layer + 6 * cost.layer_after + cost.merging
    assert math.isclose(cost.share, cost.merging / whole) and min(cost.layer, cost.layer_after, cost.merging) > 0


def test_three_questions_are_asked():
    costs = question_costs(896, 40, InnerMerging(1, 0.5), 2, small=64)
    assert len(costs) == 3 and min(costs) > 0


def test_it_is_told_in_a_line(capsys):
    assert main(["--tokens", "8", "--turns", "1"]) == 0
    assert "width 896, 8 visual tokens: a layer" in capsys.readouterr().out
    assert main(["--tokens", "8", "--layers", "2", "--inner-layer", "1"]) == 0
    assert "inner merging dpc-knn: first prefill" in capsys.readouterr().out
