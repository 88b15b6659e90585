"""How far a long run is and how long it will take, as a bar for people or as lines of JSON for schedulers."""

from __future__ import annotations

import collections
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from .distributed import Group

# The rate is that of the last minutes: a machine that has become slower is believed, and one slow micro-batch is not.
WINDOW_S = 300.0
# A line of JSON so often, and points of the rate no closer than that many in a window.
EVERY_S, POINTS = 10.0, 100
TELL_S = 1.0  # between what a rank tells the others


def calm_bar() -> dict[str, float]:
    """Settings of a progress bar: in a log file, where each new state stays, one in two seconds is enough."""
    return {} if sys.stderr.isatty() else {"mininterval": 2.0}


class _Bar(tqdm):  # type: ignore[misc]
    """A bar that is told the rate."""

    told: float | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        shown: dict[str, Any] = super().format_dict
        return shown | ({"rate": self.told} if self.told else {})


class Progress:
    """Counts images as they are made, those of all ranks, and shows them on rank 0.

    total: images of the run; done: those that were there already. as_json: a line of JSON on stdout every `every` seconds, {"event": "progress",
    "images", "of", "images_per_s", "eta_s"}, rather than a bar on stderr. unit: what is counted instead, in the plural. shown: whether at all.
    doing: the event in JSON, and the bar's name, of what is no making.
    clock: seconds, for tests. To be made when work begins, or told so (`begin`): what was spent on compiling before is no part of the rate.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        group: Group | None = None,
        as_json: bool = False,
        unit: str = "images",
        shown: bool = True,
        doing: str = "progress",
        every: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.before, self.as_json, self.unit, self.every, self.clock = total, done, as_json, unit, every, clock
        self.group = Group() if group is None else group
        self.shown = shown and self.group.first
        self.complete, self.partial = 0, 0.0  # since the beginning: told by all ranks; by this one, and not told yet
        self.began = self.said = self.told = clock()
        self.points: collections.deque[tuple[float, float]] = collections.deque([(self.began, 0.0)])
        self.more: dict[str, Any] = {}  # what else a line of JSON says
        self.lock = threading.Lock()  # micro-batches report from threads of their own
        self.over = threading.Event()
        self.doing = doing
        settings: dict[str, Any] = calm_bar()
        if doing != "progress":  # what is done with images that are there is mostly done at once
            settings |= {"desc": doing, "delay": 2.0}
        self.bar = _Bar(total=total, initial=done, unit=unit.removesuffix("s"), disable=as_json or not self.shown, smoothing=0, **settings)

    def __enter__(self) -> Progress:
        if self.shown:
            self.teller = threading.Thread(target=self._tell, name="fastdiff-progress", daemon=True)
            self.teller.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.over.set()
        if self.shown:
            self.teller.join()
        if kind is None:
            self.move(0, complete=True)  # what the others have made since this rank's last
        self.bar.close()

    def _tell(self) -> None:
        """Say how far it is while this rank makes nothing: it waits for the others, or is in the middle of a long step."""
        with contextlib.suppress(OSError):  # another rank has ended, or nobody reads: whoever does the work finds out
            while not self.over.wait(TELL_S):
                self.move(0)

    def begin(self) -> None:
        """Forget how fast it was until now."""
        self.points.clear()
        self.points.append((self.clock(), self.complete + self.partial))

    @property
    def images(self) -> int:
        """How many there are by now."""
        return min(self.before + int(self.complete + self.partial), self.total)

    def rate(self) -> float:
        """Images per second, over the last minutes; 0 before the first."""
        (then, base), now = self.points[0], self.clock()
        made = self.complete + self.partial - base
        return max(made, 0.0) / (now - then) if now > then else 0.0  # what was under way is taken back when something stops it

    def eta(self) -> float | None:
        """Seconds that are left, None as long as nobody can know."""
        rate = self.rate()
        return (self.total - self.images) / rate if rate else None

    def part(self, images: int) -> Callable[[int], Part]:
        """For `Sampler`'s progress=: a function of a number of steps, that makes what counts them as that many images."""
        return lambda steps: Part(self, images, steps)

    def move(self, images: float, complete: bool = False) -> None:
        with self.lock:
            self.partial += images
            now = self.clock()
            if complete:
                self.complete, self.partial, self.told = self.group.add("images", round(self.partial)), 0.0, now
            elif self.group.world > 1 and now - self.told >= TELL_S:
                some = int(self.partial)
                self.complete, self.partial, self.told = self.group.add("images", some), self.partial - some, now
            if now - self.points[-1][0] >= WINDOW_S / POINTS:
                self.points.append((now, self.complete + self.partial))
                while len(self.points) > 2 and now - self.points[1][0] >= WINDOW_S:
                    self.points.popleft()
            if not self.shown:
                return
            if self.as_json and now - self.said >= self.every:
                self.say(now)
            elif not self.as_json:
                self.bar.told = self.rate()
                self.bar.update(self.images - self.bar.n)

    def note(self, text: str, **values: Any) -> None:
        """What else is to be said: beside the bar, or in lines of JSON."""
        self.bar.set_postfix_str(text, refresh=False)
        self.more.update(values)

    def say(self, now: float) -> None:
        if self.group.world > 1:
            self.complete = self.group.add("images", 0)
        left, self.said = self.eta(), now
        line = {
            "event": self.doing, self.unit: self.images, "of": self.total, f"{self.unit}_per_s": float(f"{self.rate():.4g}"),
            "eta_s": None if left is None else round(left, 1), **self.more,
        }  # fmt: skip
        print(json.dumps(line), flush=True)


class Part:
    """Part of a run under way. Used as a tqdm bar is."""

    def __init__(self, progress: Progress, images: int, steps: int) -> None:
        self.progress, self.images, self.steps, self.left = progress, images, max(steps, 1), max(steps, 1)
        self.lock = threading.Lock()

    def __enter__(self) -> Part:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.progress.move(self.images * self.left / self.steps, complete=True)
        else:  # it is made again, or not at all
            self.progress.move(self.images * (self.left / self.steps - 1))

    def update(self, steps: int = 1) -> None:
        with self.lock:
            steps = min(steps, self.left)
            self.left -= steps
        self.progress.move(self.images * steps / self.steps)
