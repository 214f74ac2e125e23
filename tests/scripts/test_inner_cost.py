"""The cost of inner merging can be measured."""

import math

from earlytom.config import InnerMerging
from scripts.inner_cost import main, measure


def test_a_share_is_what_the_parts_make_of_it():
    cost = measure(896, 40, InnerMerging(18, 0.5), turns=1, small=64)
    whole = 18 * cost.layer + 6 * cost.layer_after + cost.merging
    assert math.isclose(cost.share, cost.merging / whole) and min(cost.layer, cost.layer_after, cost.merging) > 0


def test_it_is_told_in_a_line(capsys):
    assert main(["--tokens", "8", "--turns", "1"]) == 0
    assert "8 visual tokens and 20 of text" in capsys.readouterr().out
