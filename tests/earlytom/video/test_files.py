"""Which videos are meant by files, directories and lists, and how a content is recognised."""

from __future__ import annotations

from pathlib import Path

import pytest

from earlytom.errors import VideoError
from earlytom.video.files import BLOCK, BLOCKS, content_identity, find_videos


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a/2.mp4", "a/10.MKV", "a/deep/1.webm", "a/notes.txt", "a/.hidden.mp4", "a/.cache/3.mp4", "b.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_files_directories_and_lists_each_video_once_in_order(clips: Path) -> None:
    inside = [Path("a/10.MKV"), Path("a/2.mp4"), Path("a/deep/1.webm")]
    assert find_videos(["a"]) == inside
    assert find_videos(["b.bin", "a", "a/2.mp4", "a/../b.bin"]) == [Path("b.bin"), *inside]
    (clips / "list.txt").write_text("a/2.mp4\n\n  missing.mp4  \na\n")
    assert find_videos(["@list.txt"]) == [Path("a/2.mp4"), Path("missing.mp4"), Path("a/10.MKV"), Path("a/deep/1.webm")]
    (clips / "link.mp4").symlink_to(clips / "a/2.mp4")
    assert find_videos(["link.mp4", "a/2.mp4"]) == [Path("link.mp4")]


def test_what_names_no_video_is_refused(clips: Path) -> None:
    (clips / "empty").mkdir()
    (clips / "blank.txt").write_text("\n \n")
    (clips / "bytes.txt").write_bytes(b"\xff\xfe")
    for name, says in (("empty", "no video lies in"), ("@blank.txt", "is empty"), ("@bytes.txt", "cannot be read"),
                       ("@none.txt", "none.txt cannot be read"), ("@a", "a cannot be read")):
        with pytest.raises(VideoError, match=says):
            find_videos(["b.bin", name])


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"

    def identity(data: bytes) -> str:
        path.write_bytes(data)
        return content_identity(path)

    small = bytes(range(256)) * 100
    long = bytes(3 * BLOCKS * BLOCK)
    found = [identity(data) for data in (
        small, small[:-1], small[:-1] + b"x", b"x" + small[1:], small[:12345] + b"x" + small[12346:],
        long, long + b"\0", long[:-1] + b"x", b"x" + long[1:],
    )]
    assert len(set(found)) == len(found) and identity(small) == found[0]
    copy = tmp_path / "another name"
    copy.write_bytes(small)
    assert content_identity(copy) == found[0]
    for wrong in (tmp_path, tmp_path / "none.mp4"):
        with pytest.raises(VideoError):
            content_identity(wrong)
    path.write_bytes(b"")
    with pytest.raises(VideoError, match="empty"):
        content_identity(path)
