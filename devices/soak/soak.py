"""Fault injection: a runtime, a broker and a subscriber, what befalls them, and the account of every prediction."""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgekit.accounting import Intervals
from edgekit.devices.soak.mosquitto import Mosquitto
from edgekit.devices.soak.proxy import Proxy, Traffic
from edgekit.devices.soak.result import CallMs, Lost, SoakResult, blame
from edgekit.devices.soak.supervised import Runtime
from edgekit.errors import EdgekitError
from edgekit.mqtt import GOOD_S
from edgekit.subscriber import Subscriber

logger = logging.getLogger(__name__)

_MADE = ("-m", "edgekit.devices.soak.runtime")
_DEVICE, _STREAM = "soak", "main"
# The longest that a fault lasts.
_LONGEST_S = 10.0
# A connection is tried again every 30 s at least, and what waited is sent then: so long may nothing arrive.
_PATIENCE_S = 60.0
_START_S = 60.0


@dataclass(frozen=True)
class Faults:
    """How often what happens. A broker is killed (SIGKILL) or restarted (SIGTERM), a runtime is killed."""

    broker_kills: int
    broker_restarts: int
    runtime_kills: int
    cuts: int
    delays: int
    disk_full: int


class Step(NamedTuple):
    at_s: float
    action: str


# What begins, among which only one lasts at a time, and what ends it.
_LANES: tuple[tuple[dict[str, str], str], ...] = (
    ({"kill broker": "broker_kills", "restart broker": "broker_restarts"}, "start broker"),
    ({"kill runtime": "runtime_kills"}, "start runtime"),
    ({"cut": "cuts", "delay": "delays"}, "mend network"),
    ({"fill disk": "disk_full"}, "free disk"),
)

_BEGINS = {action for begins, _ in _LANES for action in begins}


def schedule(faults: Faults, duration_s: float, chance: random.Random) -> list[Step]:
    """When what begins and ends. Those of a kind are spread over the time, and those of different kinds overlap."""
    steps = []
    for begins, end in _LANES:
        actions = [action for action, name in begins.items() for _ in range(getattr(faults, name))]
        chance.shuffle(actions)
        for place, action in enumerate(actions):
            slot_s = duration_s / len(actions)
            at_s = slot_s * (place + chance.uniform(0.1, 0.5))
            lasts_s = min(_LONGEST_S, slot_s * chance.uniform(0.05, 0.4))
            steps += [Step(at_s, action), Step(at_s + lasts_s, end)]
    return sorted(steps)


class _Soak:
    """One soak: what takes part in it, and what may happen to it."""

    def __init__(self, stack: ExitStack, command: list[str], folder: Path, chance: random.Random) -> None:
        self._chance = chance
        self.broker = stack.enter_context(Mosquitto(folder))
        self.from_runtime, self.to_subscriber = Traffic(), Traffic()
        self.network = stack.enter_context(Proxy(self.broker.port, self.from_runtime))
        quiet = stack.enter_context(Proxy(self.broker.port, self.to_subscriber))
        self.subscriber = Subscriber(
            f"mqtt://127.0.0.1:{quiet.port}",
            device=_DEVICE,
            kinds=("prediction", "health"),
            client_id="edgekit-soak",
            session_expiry_s=7 * 86400,
        )
        stack.callback(self.subscriber.close)
        self.broker.save()
        self._broker_ended_s = 0.0
        address = ["--broker", f"mqtt://127.0.0.1:{self.network.port}", "--device-id", _DEVICE, "--stream", _STREAM]
        self.runtime = Runtime([*command, *address], folder)
        stack.callback(self.runtime.kill)
        self._actions: dict[str, Callable[[], None]] = {
            "kill broker": lambda: self._end_broker(self.broker.kill),
            "restart broker": lambda: self._end_broker(self.broker.stop),
            "start broker": self.broker.start,
            "kill runtime": self.runtime.kill,
            "start runtime": self.runtime.start,
            "cut": self.network.cut,
            "delay": self._delay,
            "mend network": self.network.mend,
            "fill disk": lambda: self.runtime.fill_disk(chance.random()),
            "free disk": self.runtime.free_disk,
        }

    def endure(self, steps: list[Step], duration_s: float, progress: Callable[[str, int, int], None] | None) -> float:
        """Lets the steps happen, each at its time or, if it must be waited for, later; how long it took."""
        self._start_runtime()
        started_s = began_s = time.monotonic()
        for at_s, action in [*steps, Step(duration_s, "")]:
            while (now_s := time.monotonic() - began_s) < at_s:
                if progress:
                    progress("soak", int(now_s), int(duration_s))
                self.runtime.tend()
                self._receive(min(0.5, at_s - now_s))
            if action:
                logger.info("%.1f s: %s", now_s, action)
                before_s = time.monotonic()
                self._actions[action]()
                began_s += time.monotonic() - before_s  # what it waited for moves all that is to come
        return time.monotonic() - started_s

    def _start_runtime(self) -> None:
        """And waits until it predicts.

        Raises:
            EdgekitError: it does not.
        """
        boots, ended, deadline_s = len(self.runtime.told()), len(self.runtime.ended), time.monotonic() + _START_S
        self.runtime.start()
        while len(self.runtime.told()) == boots:
            self._receive(0.1)
            self.runtime.tend()
            if len(self.runtime.ended) > ended or time.monotonic() > deadline_s:
                raise EdgekitError("the runtime does not start", got="".join(self.runtime.ended[-1:]))

    def settle(self) -> None:
        """Ends the runtime, and has it run once more for what it left."""
        self._receive_all(self.runtime.told(), _PATIENCE_S)
        self.runtime.stop()
        told = self.runtime.told()
        if self._receive_all(told, 2.0):
            self._start_runtime()
            self._receive_all(told, _PATIENCE_S)
            self.runtime.stop()
            self._receive_all(self.runtime.told(), 2.0)
        self._receive(0.5)  # what comes twice

    def _receive_all(self, told: Mapping[str, Intervals], patience_s: float) -> bool:
        """Receives until all that was told has come, or nothing comes for so long; whether any is missing."""
        last_s, before = time.monotonic(), -1
        while (missing := self.missing_count(told)) and time.monotonic() - last_s < patience_s:
            if missing != before:
                last_s, before = time.monotonic(), missing
            self._receive(0.2)
        return bool(missing)

    def _receive(self, duration_s: float) -> None:
        end_s = time.monotonic() + duration_s
        with suppress(TimeoutError):
            while (left_s := end_s - time.monotonic()) > 0:
                message = self.subscriber.next(left_s)
                if message.health:
                    self.runtime.shed[self.runtime.starts] = message.health.spool.shed

    def _arrived(self) -> dict[str, Intervals]:
        return {boot.boot_id: boot.received for boot in self.subscriber.accounting.boots}

    def missing_count(self, told: Mapping[str, Intervals]) -> int:
        arrived, nothing = self._arrived(), Intervals()
        return sum(sent.size() - sent.common(arrived.get(boot_id, nothing)).size() for boot_id, sent in told.items())

    def lost(self, told: Mapping[str, Intervals]) -> list[Lost]:
        first, second = self.from_runtime.passages(), self.to_subscriber.passages()
        arrived, nothing = self._arrived(), Intervals()
        return [
            blame(name := f"{boot_id}-{seq}", first.get(name), second.get(name))
            for boot_id, sent in told.items()
            for seq in chain.from_iterable(sent.ranges())
            if seq not in arrived.get(boot_id, nothing)
        ]

    def result(self, seed: int, duration_s: float, rate: float, steps: list[Step]) -> SoakResult:
        told, accounting, runtime = self.runtime.told(), self.subscriber.accounting, self.runtime
        sent = sum(one.size() for one in told.values())
        shed: Counter[str] = Counter()
        for of_start in runtime.shed.values():
            shed.update(of_start)
        calls, sent_by = np.array(runtime.calls_ms), self.from_runtime.passages()
        return SoakResult(
            seed=seed,
            duration_s=duration_s,
            rate=rate,
            faults=dict(Counter(action for _, action in steps if action in _BEGINS)),
            runtime_starts=runtime.starts,
            runtime_ended=runtime.ended,
            sent=sent,
            received=accounting.predictions,
            untold=accounting.predictions - sent + self.missing_count(told),
            lost=self.lost(told),
            duplicates=accounting.duplicates,
            duplicates_unflagged=accounting.duplicates_unflagged,
            duplicates_by_broker=sum(
                max(0, passage.times - sent_by.get(prediction, passage).times)
                for prediction, passage in self.to_subscriber.passages().items()
            ),
            reordered=accounting.reordered,
            shed=dict(shed),
            call_ms=CallMs(*np.percentile(calls, [50, 99, 100]).round(3).tolist()) if calls.size else None,
        )

    def _delay(self) -> None:
        self.network.delay_s = self._chance.uniform(0.05, 2.0)

    def _end_broker(self, end: Callable[[], None]) -> None:
        """Not before the subscriber has been back for a while and has all that the broker acknowledged.

        Mosquitto writes a message down a moment after it acknowledged it, so that it may lose it if it is killed just
        then. It passes it on before, if there is someone who is not behind.
        """
        deadline_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline_s and not self._caught_up():
            self._receive(0.1)
        self._broker_ended_s = time.monotonic()
        end()

    def _caught_up(self) -> bool:
        since_s = self.to_subscriber.subscribed_s
        return since_s > self._broker_ended_s and time.monotonic() - since_s > GOOD_S and not self._behind()

    def _behind(self) -> bool:
        """Whether the broker acknowledged anything that it did not pass on."""
        passed_on = self.to_subscriber.passages()
        return any(one.answer == 0 and name not in passed_on for name, one in self.from_runtime.passages().items())


def soak(
    bundle: str | os.PathLike[str] | None = None,
    source: str | None = None,
    *,
    rate: float = 50.0,
    duration_s: float = 60.0,
    seed: int = 0,
    broker_kills: int = 3,
    broker_restarts: int = 1,
    runtime_kills: int = 2,
    cuts: int = 1,
    delays: int = 1,
    disk_full: int = 1,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> SoakResult:
    """Runs a runtime with a broker and a subscriber of its own, lets faults happen, and accounts for each prediction.

    Args:
        bundle: what ``edgekit run`` runs, in a loop; None: made predictions, by way of the same publisher and spool.
        source: of the bundle, a file.
        rate: predictions a second.
        duration_s: the faults are spread over so long, and over what the broker is waited for.
        seed: of when they come and how long they last.
        broker_kills, broker_restarts, runtime_kills, cuts, delays, disk_full: how many of each kind.
        folder: where spool and logs are left; None: a temporary one.
        progress: called with ``("soak", seconds, of so many)``.

    Raises:
        EdgekitError: Mosquitto is not installed, or an argument is wrong.
    """
    if not 0 < rate <= 10_000 or not 1 <= duration_s < 1e7:
        raise EdgekitError(
            "soak", expected="a rate of up to 10,000 a second, for 1 second or more", got=f"{rate:g}, {duration_s:g} s"
        )
    if (bundle is None) != (source is None):
        raise EdgekitError("soak", expected="a bundle with a source, or neither", mend="give --source with BUNDLE")
    chance = random.Random(seed)
    faults = Faults(broker_kills, broker_restarts, runtime_kills, cuts, delays, disk_full)
    steps = schedule(faults, duration_s, chance)
    with ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgekit-soak-"))
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
        if bundle is None:
            command = [*_MADE, "--rate", f"{rate}"]
        else:
            command = ["-m", "edgekit", "run", str(bundle), "--source", str(source), "--loop", "--json"]
            command += ["--max-fps", f"{rate}"]
        one = _Soak(stack, [sys.executable, *command], Path(folder).absolute(), chance)
        took_s = one.endure(steps, duration_s, progress)
        one.settle()
        return one.result(seed, round(took_s, 1), rate, steps)
