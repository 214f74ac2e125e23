"""What every command shares: its parser, errors as one sentence, interruption that leaves nothing behind.

Nothing heavy is imported here, nor by the parsers: `--help`, `--version` and a mistyped option cost no torch.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any

from earlytom import __version__
from earlytom.errors import EarlyTomError


class Parser(argparse.ArgumentParser):
    """Takes options as they are spelt, not abbreviated (`--version` is no `--version-compatible`), and `--version`."""

    def __init__(self, program: str, description: str) -> None:
        super().__init__(prog=program, description=description, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"{program} {__version__}")


def at_least(least: int) -> Callable[[str], int]:
    """Argument type: a whole number of at least `least`."""

    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too small, at least {least} fits")
        return number

    return whole


def guarded(program: str, run: Callable[[], int]) -> int:
    """Run a command: our errors become one sentence and status 1; Ctrl-C and SIGTERM unwind, leaving nothing behind."""

    def terminate(*_: Any) -> None:
        raise SystemExit(143)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        return run()
    except EarlyTomError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted, nothing was left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
