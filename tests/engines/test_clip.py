"""`earlytom-clip`: what is drawn survives as a video file, and what `make demo` asks about it has a right answer."""

import re
import shlex

import numpy as np
import pytest

from earlytom.demo.draw import draw
from earlytom.demo.questions import questions_of
from earlytom.demo.world import make_clip
from earlytom.video import read_frames
from engines.clip import main, parser
from tests.test_layout import ROOT

MAKEFILE, README = ((ROOT / name).read_text().replace("\\\n", " ") for name in ("Makefile", "README.md"))


def test_the_video_shows_the_clip_and_right_answers_are_told(tmp_path, capsys):
    film = tmp_path / "clip.mp4"
    asked = [str(film), "--split", "validation", "--seed", "5", "--index", "15", "--frames", "8", "--rate", "4"]
    assert main([*asked, "--questions"]) == 0
    clip = make_clip("validation", 5, 15, frames=8)
    assert clip.noise == 0, "or the next line must allow for the noise, of which half is lost with the colours"
    seen = read_frames(film, frames=8)
    off = np.abs(seen.frames.astype(float) - draw(clip)).mean((1, 2, 3))
    assert off.max() < 2 and seen.frame_count == 8 and not seen.notes and not seen.repeated
    assert seen.timestamps.tolist() == [t / 4 for t in range(8)]
    told = [f"{question.prompt} -> {question.answer}" for question in questions_of(clip)]
    assert capsys.readouterr().out.splitlines() == told and told
    again = tmp_path / "again.mp4"
    assert main([str(again), *asked[1:]]) == 0
    assert again.read_bytes() == film.read_bytes() and capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.mp4", "clip.mp4"]


@pytest.mark.parametrize(
    ("name", "says"), [("nowhere/clip.mp4", "cannot be written: No such file"), ("clip.avi", "must end in .mp4")]
)
def test_what_cannot_be_written(tmp_path, capsys, name, says):
    assert main([str(tmp_path / name), "--frames", "4"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"earlytom-clip: error: {tmp_path / name}: ") and says in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [MAKEFILE, README], ids=["Makefile", "README"])
def test_what_is_asked_about_a_clip_has_a_right_answer(text):
    (drawn,) = re.findall(r"earlytom-clip (.*\.mp4.*)$", text, re.MULTILINE)
    arguments = parser().parse_args(shlex.split(drawn))
    asked = re.search(rf"earlytom-infer .*--video {arguments.output} .*$", text, re.MULTILINE)[0]
    questions = questions_of(make_clip(arguments.split, arguments.seed, arguments.index, frames=arguments.frames))
    prompts = re.findall('--prompt "([^"]*)"', asked)
    assert prompts and set(prompts) <= {prompt for one in questions for prompt in (one.prompt, one.text)}
