"""What a dry run and a report tell of the cost: before and after, and the least time on a card."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from earlytom.flops import model_work
from earlytom.language.geometry import PUBLISHED
from earlytom.presets import preset
from earlytom.vision.geometry import VisionGeometry
from engines.bundle.manifest import Manifest
from engines.rates import RATES, floor
from export.cli import main
from export.costs import UNKNOWN_LLM, cost_section, floor_lines, floors, work_lines
from tests.cases import SMALL, TINY, small_config

IDENTITY = {"name": "small", "format": "demo", "digest": "0" * 64}
SEVEN = model_work(preset(retain=0.1), VisionGeometry(), PUBLISHED[3584], dtype="fp16")


def test_each_part_and_the_sum_are_told():
    text = "\n".join(work_lines(SEVEN))
    assert "vision    20.54 -> 15.13 TFLOP (74%), weights 795 MB" in text
    assert "prefill   98.24 -> 7.246 TFLOP (7%), weights 14.1 GB, keys and values 362 MB -> 31.3 MB" in text
    assert "decode    16.67 -> 14.36 GFLOP a token (86%)" in text
    assert "all up to the first token: 119.6 -> 22.44 TFLOP (19%)" in text and "32 text tokens" in text
    assert all(len(line) < 130 for line in work_lines(SEVEN))


def test_the_floor_is_told_for_every_card_that_has_figures():
    lines = floor_lines(SEVEN, "a100,t4,sm80", "fp16")
    parts = sum(1000 * floor(part, RATES["a100"], "fp16").seconds for part in SEVEN.after.to_first_token)
    assert f"  A100 80 GB SXM: first token 357.7 -> {parts:.4g} (vision 65.8 -> 48.5, " in lines[1]
    assert lines[1].endswith("then 7.11 -> 6.95 by bytes a token")
    assert "T4" in lines[2] and lines[3].startswith("  sm80: no figures; there are some for a100, ")
    assert "no matrix products in bf16" in floor_lines(SEVEN, "t4", "bf16")[1]
    assert "with TF32, which is off here" in floor_lines(SEVEN, "a100", "fp32")[1]
    assert "--for a100" in floor_lines(SEVEN, None, "fp16")[0] and floors(SEVEN, None, "fp16") == []


def test_without_the_llms_sizes_one_sentence_says_so():
    work = model_work(preset(retain=0.1), VisionGeometry(), None, dtype="fp16")
    assert work_lines(work)[-1].strip() == UNKNOWN_LLM
    assert "tower 68.36 -> 48.71 (vision" in floor_lines(work, "a100", "fp16")[1]


def test_a_dry_run_has_it_as_json(tmp_path, capsys):
    argv = ["--checkpoint", str(TINY), "--inner-layer", "3", "--engine", "none", "--for", "a100,l4,sm89"]
    assert main([*argv, "--output", str(tmp_path / "none"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    missing, *found = plan["floors"]
    assert missing == {"card": "sm89", "why": "no figures"}
    assert [least["card"] for least in found] == ["A100 80 GB SXM", "L4"]
    for name in ("vision", "projector", "prefill", "decode"):
        assert 0 < plan["work"][name]["after"]["flops"] < plan["work"][name]["before"]["flops"]
        assert found[0]["parts"][name]["after"]["seconds"] > 0
    parts = (found[1]["parts"][name]["after"]["seconds"] for name in ("vision", "projector", "prefill"))
    assert found[1]["first_token_seconds"]["after"] == pytest.approx(sum(parts))
    assert plan["checkpoint"]["language"]["layers"] == plan["checkpoint"]["language_layers"] == 6


def test_a_report_has_the_llm_where_the_bundle_tells_its_sizes():
    manifest = Manifest.derive(
        small_config(), SMALL, dtype="fp32", opset=20, attention="primitives", checkpoint=IDENTITY, tools={}
    )
    sizes = {**PUBLISHED[896].to_dict(), "layers": 20}
    known = replace(manifest, checkpoint=manifest.checkpoint | {"language": sizes})
    later = replace(manifest, checkpoint=manifest.checkpoint | {"language": {"experts": 8}})
    assert "LLM prefill, with 32 text tokens, TFLOP" in cost_section(known)
    assert "LLM decode, with 32 text tokens, GFLOP a token" in cost_section(known)
    assert "LLM prefill, with" not in cost_section(manifest) and cost_section(later) == cost_section(manifest)
