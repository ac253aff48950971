"""Looks at the cards in the background and keeps ready what is to be sent.

No request ever waits for a driver: each gets the bytes made from the last sample, with that sample's true age.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime

import attrs

from gpupool_sync import wire
from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.devices import Reader
from gpupool_sync.models import LeaseOffer, Sample

logger = logging.getLogger(__name__)

#: Seconds that one look at the cards may take before those that do not answer are given up on.
READ_TIMEOUT = 5.0
#: Seconds that stopping waits for a look that is under way.
LAST_PATIENCE = 1.0
#: So many looks may be missing before the server calls itself unhealthy.
MISSED = 3


@attrs.frozen
class Page:
    """One body, ready to be sent."""

    body: bytes
    etag: bytes
    headers: tuple[tuple[bytes, bytes], ...] = attrs.field(repr=False)


def make_page(document: object) -> Page:
    """Serialise once, for any number of requests."""
    body = wire.dump(document)
    etag = b'"' + hashlib.blake2b(body, digest_size=12).hexdigest().encode() + b'"'
    headers = (
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"etag", etag),
        (b"cache-control", b"no-cache"),
    )
    return Page(body, etag, headers)


@attrs.frozen
class Published:
    """What requests are answered from; replaced as a whole."""

    #: None: the cards could not be read yet.
    sample: Sample | None
    pages: Mapping[str, Page] = attrs.field(repr=False)
    #: `boottime` of the end of the last look that succeeded.
    read_at: float | None = None
    #: Why the last look failed; None: it did not.
    error: str | None = None


def local_time(instant: float) -> str:
    """A `boottime` as local time without a zone, as the predecessor writes it."""
    return datetime.fromtimestamp(time.time() - (boottime() - instant)).isoformat(timespec="microseconds")


def _publish(sample: Sample, now: float) -> Published:
    timestamp = local_time(sample.taken_at)
    pages = {
        "/gpu/summary": make_page(wire.summary_document(sample, timestamp=timestamp)),
        "/gpu/stats": make_page(wire.stats_document(sample, timestamp=timestamp)),
        "/gpu/count": make_page(wire.count_document(sample, timestamp=timestamp)),
    }
    return Published(sample, pages, read_at=now)


def _failure(message: str) -> Published:
    # With status 200, as the predecessor: its clients read the body.
    page = make_page(wire.failure_document(message, local_time(boottime())))
    return Published(None, dict.fromkeys(("/gpu/summary", "/gpu/stats", "/gpu/count"), page), error=message)


class Sampler:
    """
    A daemon thread that reads the cards every *interval* seconds.

    A look that fails or hangs leaves the last sample where it is; its age, which is sent with it, goes on growing.
    """

    def __init__(self, reader: Reader, *, interval: float = 1.0, read_timeout: float = READ_TIMEOUT) -> None:
        self.reader = reader
        self.interval = interval
        #: What the summary tells of leases; None: this server grants none. To be set before `start`.
        self.offer: LeaseOffer | None = None
        #: Tells whether anybody has a lease on the card of a UUID; None: this server grants none. Likewise.
        self.is_leased: Callable[[str], bool | None] | None = None
        self._read_timeout = read_timeout
        self._published = _failure("the GPUs are being read for the first time")
        # Guards the counters and flags below; never held during a look or while serialising.
        self._changed = threading.Condition()
        self._wanted = 0  # number of the look that somebody asked for
        self._begun = 0
        self._ended = 0
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._uuids: tuple[Sample, frozenset[str]] | None = None  # replaced as a whole

    @property
    def published(self) -> Published:
        """The latest, never waits."""
        return self._published

    @property
    def can_read(self) -> bool:
        """Whether there is a way to read cards on this machine."""
        return getattr(self.reader, "available", True)

    @property
    def overdue(self) -> bool:
        """Whether the last good look is longer ago than a healthy reader could explain."""
        read_at = self._published.read_at
        return read_at is None or boottime() - read_at > MISSED * self.interval + self._read_timeout

    def start(self) -> None:
        """Begin to look; the first look is under way when this returns."""
        with self._changed:
            if self._thread is not None or self._stopping:
                return
            self._thread = threading.Thread(target=self._run, name="gpupool-sampler", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look no more and close the reader; a look that hangs is left behind."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(LAST_PATIENCE)
            if thread.is_alive():
                logger.warning("the thread %s does not stop: the driver does not answer", thread.name)
        self.reader.close()

    def owns(self, key: str) -> bool:
        """Whether a card of this UUID is among the readings."""
        sample = self._published.sample
        if sample is None:
            return False
        known = self._uuids
        if known is None or known[0] is not sample:
            known = self._uuids = (sample, frozenset(gpu.uuid for gpu in sample.gpus if gpu.uuid is not None))
        return key in known[1]

    def refresh(self, timeout: float) -> bool:
        """
        Look anew and wait for the result; False if it is not there within *timeout* seconds.

        The look begins after this call, so it shows whatever was done to the cards before.
        """
        deadline = Deadline.after(timeout)
        with self._changed:
            number = self._wanted = self._begun + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended >= number or self._stopping, deadline.remaining())
            return self._ended >= number

    def wait_for_first(self, timeout: float) -> bool:
        """Wait for the end of the first look, good or bad; False if it is not over within *timeout* seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended > 0, timeout)

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopping or self._wanted > self._begun, max(0.0, due - time.monotonic())
                )
                if self._stopping:
                    return
                self._begun += 1
            # Set before the look: a slow one must not be followed by a burst of late ones.
            due = max(due + self.interval, time.monotonic())
            self._look()
            with self._changed:
                self._ended = self._begun
                self._changed.notify_all()

    def _look(self) -> None:
        before = self._published
        try:
            sample = self.reader.read(self._read_timeout)
            after = _publish(self._with_leases(sample), boottime())
        except Exception as exc:  # whatever a driver comes up with, the server lives
            message = str(exc) or type(exc).__name__
            if before.error != message:
                logger.warning("the GPUs cannot be read: %s", message)
            after = _failure(message) if before.sample is None else attrs.evolve(before, error=message)
        else:
            if before.error is not None and before.sample is not None:
                logger.warning("the GPUs can be read again")
            self._log_faults(before.sample, sample)
        self._published = after

    def _with_leases(self, sample: Sample) -> Sample:
        is_leased = self.is_leased
        gpus = sample.gpus
        if is_leased is not None:
            gpus = tuple(gpu if gpu.uuid is None else attrs.evolve(gpu, leased=is_leased(gpu.uuid)) for gpu in gpus)
        return attrs.evolve(sample, gpus=gpus, leases=self.offer)

    def _log_faults(self, before: Sample | None, after: Sample) -> None:
        known = {fault.local_gpu_id for fault in before.faults} if before is not None else set()
        for fault in after.faults:
            if fault.local_gpu_id not in known:
                logger.warning("GPU %s cannot be read: %s", fault.local_gpu_id, fault.reason)
        for number in sorted(known - {fault.local_gpu_id for fault in after.faults}, key=str):
            logger.warning("GPU %s can be read again", number)
