"""The demo's training: what it is told is true, packed questions are alone with the video, and it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from earlytom.checkpoint.demo_tokenizer import make_tokenizer
from earlytom.checkpoint.formats import SO400M
from earlytom.demo.draw import RGB, draw
from earlytom.demo.questions import PLACES, side_of
from earlytom.demo.world import COLOURS, SHAPES, SIZE, make_clip
from earlytom.errors import InputError
from scripts.train_demo.curve import read_log
from scripts.train_demo.language import BINS, Packer, answer_loss, make_lessons
from scripts.train_demo.run import train
from scripts.train_demo.stages import STAGES
from scripts.train_demo.student import Student
from scripts.train_demo.tower import GRID, crowd, label, make_batch, see


@pytest.fixture(scope="module")
def student() -> Student:
    return Student(0)


@pytest.fixture(scope="module")
def packer() -> Packer:
    return Packer(make_tokenizer())


@pytest.mark.parametrize(("side", "patch"), [(8, 48), (14, 14), (27, 14)])
def test_all_patches_of_a_thing_tell_where_its_centre_is(side: int, patch: int) -> None:
    told = 0
    for lesson in make_lessons(5, 3, 6, 6, side, 1, patch):
        clip = lesson.clip
        for t, said in enumerate(lesson.labels().numpy()):
            shown = t + 1 if clip.ghost[t] > 0.5 and t + 1 < clip.frames else t
            centres = {SHAPES.index(thing.shape): clip.centre(thing, shown) for thing in clip.visible(shown)}
            words = said[:, -2 * BINS - len(PLACES) :]
            columns, rows, sides = np.split(words, [BINS, 2 * BINS], axis=1)
            there = said[:, : len(SHAPES)].any(1)
            assert (words[~there] == 0).all() and ((words[there] > 0).sum(1) == 3).all()
            for patch_said, column, row, place in zip(*(x[there] for x in (said, columns, rows, sides))):
                x, y = centres[int(patch_said[: len(SHAPES)].argmax())]
                assert (column.argmax(), row.argmax()) == (int(x * BINS / SIZE), int(y * BINS / SIZE))
                assert PLACES[place.argmax()] == side_of(x, y)
                told += 1
    assert told > 100


@pytest.mark.parametrize("stretch", [1, 4])
def test_packed_questions_have_the_loss_they_have_alone(student: Student, packer: Packer, stretch: int) -> None:
    """Positions, masks and labels of the packed sequence against one plain causal sequence for each question."""
    lessons = make_lessons(0, 0, 2, 4, 8, 4, 48)
    visual = student.sequence(student.describer(torch.stack([lesson.labels() for lesson in lessons]))).detach()
    packed, _ = answer_loss(student.language, packer, lessons, visual, stretch)
    words, total, count = student.language.get_input_embeddings(), 0.0, 0
    student.language.set_attn_implementation("sdpa")
    try:
        for lesson, tokens in zip(lessons, visual):
            for question in lesson.questions:
                segment, at = packer.segment(question)
                embeds = [words(torch.tensor(packer.before)), tokens, words(torch.tensor(segment))]
                start, end = len(packer.before), len(packer.before) + len(tokens) * stretch
                places = [*range(start), *range(start, end, stretch), *range(end, end + len(segment))]
                logits = student.language(
                    inputs_embeds=torch.cat(embeds)[None], position_ids=torch.tensor(places)[None]
                ).logits[0]
                answer = torch.tensor(segment[at:])
                total += F.cross_entropy(logits[-len(answer) - 1 : -1], answer, reduction="sum").item()
                count += len(answer)
    finally:
        student.language.set_attn_implementation("packed")
    assert packed.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("index", range(6))
def test_labels_say_what_is_drawn(index: int) -> None:
    """At the centre of a patch that a thing covers wholly, the pixel has the colour that the label names."""
    clip = make_clip("train", 3, index, frames=8)
    clip = type(clip)(**{**clip.__dict__, "noise": 0.0, "ghost": (0.0,) * clip.frames})
    frame = 5
    (thing, offset, counts, _, mask, around) = label(clip, frame, (0, 0), GRID)
    picture = draw(clip, [frame])[0]
    for patch in np.flatnonzero(mask.all(1)):
        y, x = patch // GRID * 14 + 7, patch % GRID * 14 + 7
        colour = COLOURS[thing[patch, 1] - 1]
        assert np.abs(picture[y, x].astype(int) - RGB[colour]).max() <= 1
        seen = next(t for t in clip.visible(frame) if clip.colour(t, frame) == colour)
        assert SHAPES[thing[patch, 0] - 1] == seen.shape
        centre = (x + offset[patch, 0] * 14, y + offset[patch, 1] * 14)
        assert centre == pytest.approx(clip.centre(seen, frame), abs=0.01)
        assert around[patch].reshape(10, 10)[4:6, 4:6].tolist() == [[1, 1], [1, 1]]
    assert counts.sum() == len(clip.visible(frame))


def test_a_window_sees_what_the_whole_frame_sees_there(student: Student) -> None:
    clip = make_clip("train", 0, 0, frames=4)
    whole = torch.from_numpy(draw(clip, [0]))
    row, column = 5, 9
    part = torch.from_numpy(draw(clip, [0], (column * 14, row * 14, (column + 14) * 14, (row + 14) * 14)))
    blind = student.vision.layers
    student.vision.layers = torch.nn.ModuleList([torch.nn.Identity()])
    student.vision.layers[0].forward = lambda x: (x, None)  # type: ignore[method-assign]
    try:
        (expected,) = see(student.vision, whole, torch.tensor([[0, 0]]))
        (seen,) = see(student.vision, part, torch.tensor([[row, column]]))
    finally:
        student.vision.layers = blind
    expected = expected.view(GRID, GRID, -1)[row : row + 14, column : column + 14].flatten(0, 1)
    torch.testing.assert_close(seen[0], expected)


def test_no_held_out_combination_is_in_a_crowd() -> None:
    rng = Random(0)
    crowds = [crowd(rng, (0, 0, SIZE, SIZE)) for _ in range(100)]
    assert sum(len(clip.things) for clip in crowds) > 300
    assert not any(thing.held_out for clip in crowds for thing in clip.things)


def test_batches_follow_from_seed_and_step() -> None:
    one, again, other = make_batch(0, 7, 2), make_batch(0, 7, 2), make_batch(0, 8, 2)
    assert torch.equal(one.frames, again.frames)
    assert not torch.equal(one.frames, other.frames)


def test_a_step_that_was_run_again_counts_as_it_was_last(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    told = [("see", 50, 0.1), ("see", 100, 0.2), ("read", 50, 0.3), ("see", 50, 0.4)]
    log.write_text("".join(json.dumps({"stage": a, "step": b, "named": c}) + "\n" for a, b, c in told))
    assert [(row["stage"], row["step"], row["named"]) for row in read_log(log)] == [
        ("see", 50, 0.4), ("see", 100, 0.2), ("read", 50, 0.3)
    ]
    log.write_text("[1]\n")
    with pytest.raises(InputError, match="no log of the demo's training"):
        read_log(log)


@pytest.mark.slow
def test_every_stage_runs_resumes_draws_ahead_and_ends_in_a_checkpoint(tmp_path: Path) -> None:
    train(tmp_path / "some", smoke=True, only=[STAGES[0].name])
    out = train(tmp_path / "some", smoke=True, workers=1)
    whole = train(tmp_path / "whole", smoke=True)
    tensors, others = load_file(out), load_file(whole)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert sum(t.numel() * 4 for t in tensors.values()) <= 12e6
    rows = [json.loads(line) for line in (tmp_path / "some" / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == [stage.name for stage in STAGES]
    assert SO400M["image_size"] == SIZE
