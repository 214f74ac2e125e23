"""The run of `python -m scripts.gpu_check`: steps in order of importance, a budget of minutes, a file always whole.

A step that the time left does not suffice for is skipped, and so is one whose needs are not here; each says why. After
every step the file is written anew, so that nothing measured is lost however the run ends.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlytom.dtypes import DTYPES
from earlytom.errors import ConfigError, EarlyTomError

from .journal import Clock, Journal, OutOfTime, Skip, Step


@dataclass(frozen=True)
class CheckOptions:
    """output: the JSON file; minutes: when to be done; steps: names or parts of names, None for all; dtypes: in order
    of importance; quick: a tiny tower, to try everything; work: where graphs and engines go (default: a temporary
    directory), removed afterwards unless `keep`."""

    output: Path
    minutes: float = 8.0
    steps: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] = ("fp16", "bf16")
    quick: bool = False
    work: Path | None = None
    keep: bool = False
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ConfigError(f"minutes is {self.minutes:g}, it must be above 0")
        unknown = [dtype for dtype in self.dtypes if dtype not in DTYPES]
        if unknown or not self.dtypes:
            raise ConfigError(f"dtypes are {', '.join(self.dtypes) or 'none'}, each must be one of {', '.join(DTYPES)}")


def run_check(options: CheckOptions) -> dict[str, Any]:
    """Do all steps that fit, and return what the JSON file holds. Ctrl-C and SIGTERM end it with what was measured.

    `interrupted` in the answer says so. Raises ConfigError for steps that do not exist.
    """
    import torch

    from engines.measure.machine import clocks, describe_machine

    from .report import summarise
    from .steps import all_steps
    from .workshop import Workshop

    clock = Clock(options.minutes)
    torch.backends.cudnn.allow_tf32 = False  # float32 is the reference here
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "command": list(options.command), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "quick": options.quick,
        "machine": describe_machine(), "clocks": {"before": clocks()}, "interrupted": None,
    }
    journal = Journal(options.output, head)
    journal.write()
    with _folder(options) as folder, _limits(clock):
        shop = Workshop(folder, device, quick=options.quick, tick=clock.check)
        steps = _chosen(all_steps(shop, journal, clock, options.dtypes), options.steps)
        try:
            for step in steps:
                _one(step, journal, clock)
        except (KeyboardInterrupt, SystemExit) as end:
            word = "Ctrl-C" if isinstance(end, KeyboardInterrupt) else "a signal"
            journal.content["interrupted"] = word
            for step in steps:
                if all(entry["name"] != step.name for entry in journal.steps):
                    journal.note(step, "skipped", reason=f"the run was ended by {word}")
        finally:
            journal.content["summary"] = summarise(journal)
            journal.content["clocks"]["after"] = clocks()
            journal.content["seconds"] = round(clock.used, 1)
            journal.content["finished"] = True
            journal.write()
            shop.close()
    return journal.content


def _one(step: Step, journal: Journal, clock: Clock) -> None:
    """Do a step and note how it went; only an end from outside leaves this function."""
    needed = step.seconds()
    if needed > clock.left:
        reason = f"needs about {needed:.0f} s and {max(0.0, clock.left):.0f} s are left"
        journal.note(step, "skipped", reason=reason)
        return
    start = time.monotonic()
    journal.note(step, "running", reason="the program ended during this step")
    print(f"gpu_check: {clock.used:5.0f} s  {step.name}: {step.what}", file=sys.stderr, flush=True)

    def done(status: str, reason: str = "", result: Any = None) -> None:
        journal.note(step, status, reason=reason, seconds=time.monotonic() - start, result=result)
        if reason:
            print(f"gpu_check:          {status}: {reason}", file=sys.stderr, flush=True)

    try:
        clock.inside = True
        try:
            result = step.run()
        except Exception as error:
            if clock.ended:  # a library made an error of its own of the signal
                raise SystemExit(143) from error
            raise
        finally:
            clock.inside = False
    except Skip as error:
        done("skipped", str(error), error.result)
    except OutOfTime as error:
        done("skipped", str(error))
    except ImportError as error:
        done("skipped", f"the package {error.name or error} is not here")
    except (KeyboardInterrupt, SystemExit):
        done("interrupted", "the run was ended during this step")
        raise
    except EarlyTomError as error:
        done("failed", str(error))
    except Exception as error:  # one step must not take the others with it
        lines = str(error).strip().splitlines()
        done("failed", f"{type(error).__name__}: {lines[0] if lines else ''}"[:500])
    else:
        done("done", result=result)


def _chosen(steps: Sequence[Step], wanted: tuple[str, ...] | None) -> list[Step]:
    if wanted is None:
        return list(steps)
    unknown = [name for name in wanted if not any(name in step.name for step in steps)]
    if unknown:
        raise ConfigError(f"there is no step {', '.join(unknown)}: the steps are {', '.join(s.name for s in steps)}")
    return [step for step in steps if any(name in step.name for name in wanted)]


@contextmanager
def _folder(options: CheckOptions) -> Iterator[Path]:
    parent = options.work
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    if options.keep and parent is not None:
        yield Path(tempfile.mkdtemp(prefix="gpu_check-", dir=parent))
        return
    with tempfile.TemporaryDirectory(prefix="gpu_check-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def _limits(clock: Clock) -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does; SIGALRM ends the step in which the time runs out, however deep it is."""

    def terminate(*_: Any) -> None:
        clock.ended = True
        raise SystemExit(143)

    def alarm(*_: Any) -> None:
        if clock.inside:
            raise OutOfTime("the time was up")

    before = signal.signal(signal.SIGTERM, terminate)
    previous = signal.signal(signal.SIGALRM, alarm) if hasattr(signal, "SIGALRM") else None
    try:
        if previous is not None:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, clock.left))
        yield
    finally:
        if previous is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        signal.signal(signal.SIGTERM, before)
