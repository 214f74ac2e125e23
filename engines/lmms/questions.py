"""lmms-eval's requests as questions about video files, in the order in which they came.

Two forms: "simple", a text beside the visuals of the document; "chat", messages whose parts are text and visuals. What
is no question about one whole video is refused: an answer given without looking would count as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from earlytom.errors import InputError

# Of generation_kwargs: what changes the answer. Others are refused, but for what concerns images only.
SAMPLING = ("temperature", "top_p", "top_k")
IGNORED = ("image_aspect_ratio",)
NEW_TOKENS = 1024  # where a task does not say, as lmms-eval's own LLaVA-OneVision


@dataclass(frozen=True)
class Generation:
    """How an answer is made: greedily unless do_sample, which the next three are for; until: texts that end it."""

    max_new_tokens: int = NEW_TOKENS
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    until: tuple[str, ...] = ()

    def keywords(self) -> dict[str, Any]:
        """What transformers' generate is given."""
        given: dict[str, Any] = {"do_sample": self.do_sample}
        if self.num_beams > 1:
            given["num_beams"] = self.num_beams
        if self.do_sample:
            given |= {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        return given

    def cut(self, text: str) -> str:
        """The text up to the first of `until`, without space around it."""
        for end in self.until:
            text = text.split(end)[0]
        return text.strip()


@dataclass(frozen=True)
class VideoQuestion:
    """A question about a video file; where: the document it comes from, for people."""

    video: str
    text: str
    generation: Generation
    where: str


def read_generation(kwargs: Mapping[str, Any], where: str) -> Generation:
    """A task's generation_kwargs. Raises InputError for one that is not known here."""
    given = {name: value for name, value in kwargs.items() if value is not None and name not in IGNORED}
    if unknown := sorted(set(given) - set(Generation.__dataclass_fields__)):
        raise InputError(f"{where} asks for generation with {', '.join(unknown)}, which earlytom does not know")
    until = given.pop("until", ())
    ends = (until,) if isinstance(until, str) else tuple(until)
    temperature = given.get("temperature")
    given.setdefault("do_sample", bool(temperature))
    if given["do_sample"] and temperature == 0:
        given["do_sample"] = False  # the likeliest token is what a temperature of 0 means
    return Generation(**given, until=tuple(end for end in ends if end))


def simple_question(text: str, visuals: Any, generation: Generation, where: str) -> VideoQuestion:
    """visuals: what the task's doc_to_visual gave: a list with the path of one video. Raises InputError."""
    found = list(visuals) if isinstance(visuals, (list, tuple)) else [visuals]
    return VideoQuestion(_one_video(found, where), text, generation, where)


def chat_question(messages: Sequence[Mapping[str, Any]], generation: Generation, where: str) -> VideoQuestion:
    """messages: one of the user, its text behind the video, as the models were trained. Raises InputError."""
    if [message["role"] for message in messages] != ["user"]:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise InputError(f"{where} is a conversation of {roles}: earlytom takes one message of the user")
    (message,) = messages
    parts = message["content"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    visuals = [part for part in parts if part["type"] != "text"]
    if any(part.get("start_time") is not None or part.get("end_time") is not None for part in visuals):
        raise InputError(f"{where} asks about a part of a video: earlytom samples its frames from the whole of it")
    if wrong := {part["type"] for part in visuals} - {"video"}:
        raise InputError(f"{where} comes with {' and '.join(sorted(wrong))}: earlytom takes one video")
    if parts and len(visuals) == 1 and parts[0]["type"] == "text":
        raise InputError(f"{where} has text before its video: earlytom puts the video first")
    return VideoQuestion(_one_video([part["url"] for part in visuals], where), "\n".join(texts), generation, where)


def _one_video(visuals: Sequence[Any], where: str) -> str:
    if len(visuals) != 1:
        raise InputError(f"{where} has {len(visuals)} visuals: earlytom takes one video with a question")
    (visual,) = visuals
    if not isinstance(visual, str):
        raise InputError(f"{where} comes with a {type(visual).__name__}: earlytom takes the path of a video")
    return visual
