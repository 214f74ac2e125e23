"""What the headers of a packet prove: that it holds one frame that is shown, and whether decoding may begin at it.

Nothing is decoded here, and a container's own key-frame marks are not believed: Matroska, MP4 and MPEG-TS set them on
pictures that a decoder cannot begin at without loss (open GOPs, intra refresh). What these modules cannot prove they
refuse with `Unproven`, and the whole file is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .av1 import Av1Headers
from .bits import Unproven
from .h264 import H264Headers
from .hevc import HevcHeaders
from .mjpeg import MjpegHeaders
from .vp9 import Vp9Headers


class Headers(Protocol):
    """The headers of one stream, packet by packet in the order of the file.

    `closed`: whatever follows an entry in the file is shown after it. Where not, frames that are shown before an entry
    and follow it in the file may need what precedes it.
    """

    closed: bool

    def entry(self, data: memoryview) -> bool:
        """Whether decoding may begin at this packet. Raises Unproven unless it holds one frame that is shown."""

    def check(self, reordered: int) -> None:
        """After the last packet: raises Unproven if a decoder that has to wait for `reordered` packets may not."""


HEADERS: dict[str, Callable[[bytes], Headers]] = {
    "h264": H264Headers,
    "hevc": HevcHeaders,
    "vp9": Vp9Headers,
    "libdav1d": Av1Headers,
    "mjpeg": MjpegHeaders,
}
"""By decoder: what carries from one group of pictures to the next is a matter of the decoder as well as the format."""


def headers_of(decoder: str, extradata: bytes) -> Headers:
    """Raises Unproven for a decoder whose frames have not been found to be the same wherever it begins."""
    if decoder not in HEADERS:
        raise Unproven(f"{decoder} is not a decoder that is known to give the same frames wherever it begins")
    return HEADERS[decoder](extradata)
