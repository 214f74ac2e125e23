"""What every command shares: errors as one sentence, interruption that leaves nothing behind."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

from earlytom.errors import EarlyTomError


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
