"""What --model_args may say, and what is told of what it may not."""

from __future__ import annotations

from typing import Any

import pytest

from earlytom.errors import ConfigError
from engines.lmms.arguments import ModelArguments, parse_arguments, read_arguments


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"bundle": "b"}, ModelArguments(bundle="b")),
        ({"bundle": "b", "checkpoint": "c", "inner": "as-released"},
         ModelArguments(bundle="b", checkpoint="c", inner="as-released")),
        ({"bundle": "b", "engine": "torch", "frame_budgets": "data", "batch_size": "4"},
         ModelArguments(bundle="b", engine="torch", frame_budgets="data", batch_size=4)),
        ({"checkpoint": "demo", "retain": 1}, ModelArguments(checkpoint="demo", retain=1.0)),
        ({"checkpoint": 2026, "retain": 0.1, "preset": "mvbench"},  # a path of digits: lmms-eval makes it a number
         ModelArguments(checkpoint="2026", retain=0.1, preset="mvbench")),
    ],
)
def test_what_may_be_said(values: dict[str, Any], expected: ModelArguments) -> None:
    assert read_arguments(values) == expected
    assert parse_arguments(",".join(f"{name}={value}" for name, value in values.items())) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "give bundle=DIR, or checkpoint=PATH with retain=R"),
        ("bundle=b,retain=0.2", "retain cannot go with bundle"),
        ("bundle=b,preset=mvbench,frames=8", "preset and frames cannot go with bundle"),
        ("bundle=b,retian=0.2", "there is no argument retian: the arguments are bundle, checkpoint, retain"),
        ("bundle=b,frame_budgets=data", "goes with engine=torch"),
        ("bundle=b,engine=tensorflow", "engine is 'tensorflow', it must be one of auto, "),
        ("bundle=b,inner=true", "inner is 'True', it must be one of on, off, as-released"),
        ("bundle=b,batch_size=auto", "batch_size is 'auto', it must be a whole number"),
        ("bundle=b,batch_size=0", "batch_size is 0"),
        ("bundle=b,compile=true,batch_size=2", "compile goes with batch_size 1"),
        ("bundle=b,compile=yes", "compile is 'yes', it must be true or false"),
        ("bundle=b,dtype=int8", "dtype is 'int8'"),
        ("checkpoint=c", "retain is None, with a checkpoint it must be a number"),
        ("checkpoint=c,retain=1.5", "retain is 1.5"),
        ("checkpoint=c,retain=0", "retain is 0"),
        ("checkpoint=c,retain=nan", "retain is nan"),
        ("checkpoint=c,retain=half", "retain is 'half'"),
        ("checkpoint=c,retain=0.2,engine=auto", "engine goes with bundle"),
        ("checkpoint=c,retain=0.2,preset=imagenet", "preset is 'imagenet', it must be one of mvbench, videomme"),
        ("checkpoint=c,retain=1,preset=videomme", "preset cannot go with retain=1"),
        ("checkpoint=c,retain=1,inner=as-released", "inner=as-released cannot go with retain=1"),
        ("bundle", "are no list of name=value"),
    ],
)
def test_what_may_not(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_arguments(text)
    assert told in str(refused.value) and "\n" not in str(refused.value)
