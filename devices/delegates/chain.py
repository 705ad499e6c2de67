"""The delegates of a model: the one in use, the next when it fails, and the preferred one again when it works."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

from edgekit.audio_preprocess import StreamPreprocessor, WindowPreprocessor
from edgekit.bundle import Bundle
from edgekit.custom_ops import CustomOpResolver, Ops
from edgekit.devices.delegates import plans
from edgekit.devices.delegates.backend import Backend, Interpreted
from edgekit.devices.delegates.plans import AbsentError, Plan
from edgekit.errors import BundleError, EdgekitError, InferenceError
from edgekit.manifest import AudioInput

if TYPE_CHECKING:
    from edgekit.devices.delegates.isolated import Isolated
    from edgekit.preprocess import ImagePreprocessor

logger = logging.getLogger(__name__)

Preprocessor: TypeAlias = "ImagePreprocessor | WindowPreprocessor | StreamPreprocessor"

# A delegate that does not work is tried again soon after the start, when another process may have let go of it, and
# then so often.
FIRST_RETRY_S, RETRY_S = 10.0, 300.0
# Where there is no other one, it is loaded anew, unless so many in a row failed at once.
MAX_FAILURES = 3


@dataclass(frozen=True)
class Loaded:
    """A model that is loaded, and what makes its input tensor. ``rank``: its place among the candidates."""

    rank: int
    plan: Plan
    backend: Backend
    preprocess: Preprocessor


class Chain:
    """Loads the first candidate that works. One thread uses it; another one may :meth:`tend` and :meth:`close` it.

    Args:
        bundle, delegate, order, runtime, threads, ops, strict, hang_s: as :class:`~edgekit.devices.interpreter.Model`
            has them.

    Attributes:
        active: the one in use.
    """

    def __init__(
        self,
        bundle: Bundle,
        delegate: str,
        *,
        order: Iterable[str],
        runtime: str | None,
        threads: int,
        ops: Ops,
        strict: bool,
        hang_s: float,
    ) -> None:
        self._bundle, self._auto, self._strict = bundle, delegate == "auto", strict
        self._runtime, self._threads, self._ops, self._hang_s = runtime, threads, ops, hang_s
        self._candidates = plans.candidates(bundle, delegate, order)
        self._closed = False
        self._workers: set[Isolated] = set()
        self._failures = 0
        # A preferred one that was loaded meanwhile; it takes over between two calls.
        self._waiting: Loaded | None = None
        self._trial: Iterator[None] | None = None
        self._retry_at_s = time.monotonic() + FIRST_RETRY_S
        self.active = self._first(0)

    def renew(self) -> None:
        """Has a preferred delegate that works again take over."""
        if waiting := self._waiting:
            logger.warning("delegate %s takes over from %s", waiting.plan.name, self.active.plan.name)
            self._waiting = None
            self._end(self.active.backend)
            self.active = waiting

    def replace(self, error: InferenceError) -> InferenceError:
        """Has the next candidate take over from the one in use, whose call ended in ``error``; the last one is loaded
        anew.

        Returns:
            What to raise for the call.

        Raises:
            EdgekitError: there is nothing to go on with.
        """
        failed = self.active
        what, mend = f"delegate {failed.plan.name} {error.what}", failed.plan.mend
        self._end(failed.backend)
        if self._closed:
            raise self._was_closed()
        if self._strict:
            raise BundleError(what, mend=mend)
        self._retry_at_s = time.monotonic() + RETRY_S
        if self._waiting:
            self.renew()
        elif failed.rank + 1 < len(self._candidates):
            self.active = self._first(failed.rank + 1)
        else:
            worker = _worker(failed.backend)
            self._failures = 1 if worker and worker.worked else self._failures + 1
            if self._failures >= MAX_FAILURES:
                raise BundleError(f"{what}, {self._failures} times in a row", mend=mend)
            self.active = self._first(failed.rank)
        same = self.active.rank == failed.rank
        logger.warning(
            "%s; %s%s", what, "it was loaded anew" if same else f"{self.active.plan.name} goes on", mend and f"; {mend}"
        )
        return InferenceError(what, cause=error.cause)

    def tend(self) -> None:
        """Has preferred delegates tried again when it is time. To be called every second or so; it does not wait for
        them."""
        if self._trial is None and self.active.rank and not self._waiting and time.monotonic() >= self._retry_at_s:
            self._trial = self._try_again()
        if self._trial and next(self._trial, self) is self:
            self._trial, self._retry_at_s = None, time.monotonic() + RETRY_S

    def close(self) -> None:
        self._closed = True
        self.active.backend.close()
        for worker in list(self._workers):
            worker.close()

    def _first(self, rank: int) -> Loaded:
        """The first candidate that works, from ``rank`` on.

        Raises:
            EdgekitError: none does, or with ``strict`` one that is here does not.
        """
        while True:
            try:
                loaded = self._finish(rank, *self._start(rank), math.inf)
                assert loaded
                return loaded
            except EdgekitError as error:
                absent = self._auto and isinstance(error, AbsentError)
                if rank + 1 == len(self._candidates) or self._closed or (self._strict and not absent):
                    raise
                if absent:
                    logger.info("%s; passed over", error.what)
                else:
                    logger.warning("%s; going on with %s", error, self._candidates[rank + 1])
            rank += 1

    def _try_again(self) -> Iterator[None]:
        for rank in range(self.active.rank):
            try:
                starting = self._start(rank)
                while not (loaded := self._finish(rank, *starting, 0.0)):
                    yield
                self._waiting = loaded
                return
            except EdgekitError as error:
                logger.debug("tried again: %s", error)

    def _start(self, rank: int) -> tuple[Plan, Backend]:
        """Begins to load a candidate; one in this process is loaded then.

        Raises:
            EdgekitError: it does not load.
        """
        plan = plans.plan(self._candidates[rank], self._bundle, self._runtime, auto=self._auto)
        in_files = not isinstance(self._ops, CustomOpResolver)
        # What a resolver holds can be called in this process only.
        if not plan.library and plan.name != "gpu" and not (in_files and self._ops):
            return plan, Interpreted(
                plan.file.content, plan.file.path, runtime=self._runtime, threads=self._threads, ops=self._ops
            )
        ops = self._ops.paths if isinstance(self._ops, CustomOpResolver) else self._ops
        from edgekit.devices.delegates.isolated import Isolated  # which few need

        try:
            worker = Isolated(plan, runtime=self._runtime, threads=self._threads, ops=ops, hang_s=self._hang_s)
        except OSError as error:
            raise BundleError(
                f"delegate {plan.name} cannot have a process of its own ({error})", mend="make room for it"
            ) from error
        self._workers.add(worker)
        return plan, worker

    def _finish(self, rank: int, plan: Plan, backend: Backend, wait_s: float) -> Loaded | None:
        """The candidate, loaded; None if it takes longer than ``wait_s``.

        Raises:
            EdgekitError: it does not load, or does not fit the bundle.
        """
        try:
            if (worker := _worker(backend)) and not worker.loaded(wait_s):
                return None
            if plan.library and backend.operators_delegated == 0:
                raise BundleError(f"takes none of the {backend.operators} operators")
            loaded = Loaded(rank, plan, backend, self._preprocessor(plan, backend))
        except BundleError as error:
            self._end(backend)
            if plan.name == "cpu":
                raise
            raise BundleError(f"delegate {plan.name} does not load ({error})", mend=plan.mend) from error
        if self._closed:
            self._end(backend)
            raise self._was_closed()
        return loaded

    def _preprocessor(self, plan: Plan, backend: Backend) -> Preprocessor:
        given, tensor = self._bundle.input, backend.input
        arguments = (tensor.dtype, tensor.scale, tensor.zero_point)
        preprocess: Preprocessor
        if isinstance(given, AudioInput):
            preprocess = (StreamPreprocessor if given.streaming else WindowPreprocessor)(given, *arguments)
        else:
            from edgekit.preprocess import ImagePreprocessor  # with OpenCV, of which sound has no need

            preprocess = ImagePreprocessor(given, *arguments)
        for what, expected, got in (
            ("input tensor", preprocess.tensor_shape, tensor.shape),
            ("output tensor", (1, len(self._bundle.labels)), backend.output.shape),
        ):
            if math.prod(expected) != math.prod(got) or (what == "input tensor" and expected != got):
                raise BundleError(
                    f"bundle {plan.file.path}: {what}",
                    expected=str(expected),
                    got=str(got),
                    mend="convert the model again",
                )
        return preprocess

    def _end(self, backend: Backend) -> None:
        backend.close()
        if worker := _worker(backend):
            self._workers.discard(worker)

    def _was_closed(self) -> BundleError:
        return BundleError(f"bundle {self._bundle.file.path}: the model was closed", mend="load it again")


def _worker(backend: Backend) -> Isolated | None:
    return cast("Isolated", backend) if backend.isolated else None
