"""A process that decodes and can be stopped: limits of time and memory for each image.

The child decodes one image at a time for as long as its parent lives. It holds itself to its
limits before it sees a byte: address space, processor time per image, and no file that it could
open or write. What goes wrong in it costs one image: the parent gives that image a status and
starts another child.
"""

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from pipeline.data.pixels import NotAnImage
from pipeline.fetch.decoding import TooManyPixels, Undecodable, canonical_jpeg
from pipeline.fetch.policy import FetchError

CPU_S = 10.0  # processor time of one image
WALL_S = 60.0  # the same by the clock, for a machine that is busy
BYTES_PER_PIXEL = 16  # of address space: what the dearest of the allowed decoders takes, and more
BASE_BYTES = 512 << 20  # of address space for the interpreter, the file and its stored form
_HEAD = struct.Struct(">B4IQ")  # outcome, four sizes, bytes that follow
_JOB = struct.Struct(">Q")  # bytes that follow
_LONGEST_REASON = 300
_PIECE = 1 << 16  # bytes; larger buffers cost more to make than they save
_OK, _NOT_AN_IMAGE, _TOO_LARGE, _UNDECODABLE = range(4)
_STATUSES = {
    _NOT_AN_IMAGE: "not_an_image",
    _TOO_LARGE: "too_large",
    _UNDECODABLE: "undecodable",
}
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # glibc: keep what an image took for the next one; else every image pays its page faults anew
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
_CHILD = "import sys; sys.path.insert(0, {!r}); from pipeline.fetch.decoding_process import _child; _child()"


class Decoder:
    """`canonical_jpeg` in a child process. One caller at a time; the child starts when needed."""

    def __init__(
        self,
        image_size: int,
        quality: int,
        max_pixels: int,
        cpu_s: float = CPU_S,
        wall_s: float = WALL_S,
    ):
        self.arguments = image_size, quality, max_pixels
        self.cpu_s, self.wall_s = cpu_s, wall_s
        self.child: subprocess.Popen | None = None
        self.line: socket.socket

    def canonical_jpeg(self, data: bytes) -> tuple[bytes, int, int, int, int]:
        """As in `pipeline.fetch.decoding`. Raises FetchError with the status of a row:

        `not_an_image`, `too_large`; `undecodable` where the image has cost its time or its memory,
        or has ended the child; and, since a later run may do better, `timeout` where the machine
        was too busy, and `lost` where the system killed the child.
        """
        if self.child is None:
            self.child = self._start()
        deadline = time.monotonic() + self.wall_s
        try:
            self.line.settimeout(self.wall_s)
            sent = self.line.sendmsg([_JOB.pack(len(data)), data]) - _JOB.size
            self.line.sendall(memoryview(data)[sent:])
            outcome, sizes, body = self._answer(deadline)
        except TimeoutError:
            self.close()
            raise FetchError("timeout", f"not decoded in {self.wall_s:g} s") from None
        except (EOFError, OSError):
            raise self._why_it_ended(self.child) from None
        if outcome == _OK:
            width, height, original_width, original_height = sizes
            return body, width, height, original_width, original_height
        raise FetchError(_STATUSES[outcome], body.decode())

    def _answer(self, deadline: float) -> tuple[int, list[int], bytes]:
        """Outcome, sizes and body. Raises TimeoutError, and EOFError where the child has gone."""
        have, length = bytearray(), 0
        while len(have) < _HEAD.size + length:
            self.line.settimeout(max(deadline - time.monotonic(), 1e-3))
            if not (piece := self.line.recv(_PIECE)):
                raise EOFError
            have += piece
            if len(have) >= _HEAD.size:
                outcome, *sizes, length = _HEAD.unpack_from(have)
        return outcome, sizes, bytes(memoryview(have)[_HEAD.size :])

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.line.close()
            self.child = None

    def _start(self) -> subprocess.Popen:
        self.line, other = socket.socketpair()
        code = _CHILD.format(str(Path(__file__).resolve().parents[2]))
        with other:
            numbers = [other.fileno(), *self.arguments]
            return subprocess.Popen(
                [sys.executable, "-P", "-c", code, *map(str, numbers), str(self.cpu_s)],
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env=os.environ | _ENVIRONMENT,
            )

    def _why_it_ended(self, child: subprocess.Popen) -> FetchError:
        """The status of an image whose child is gone, by the signal that ended it."""
        with suppress(subprocess.TimeoutExpired):
            child.wait(self.wall_s)
        code = child.returncode
        self.close()
        if code == -signal.SIGPROF:
            return FetchError("undecodable", f"not decoded in {self.cpu_s:g} s of processor time")
        if code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
            return FetchError("lost", f"the decoding process was killed (signal {-code})")
        return FetchError("undecodable", f"the decoding process ended with status {code}")


# In the child


def _child() -> None:
    handle, image_size, quality, max_pixels = map(int, sys.argv[1:5])
    cpu_s = float(sys.argv[5])
    line = socket.socket(fileno=handle)
    _limit_self(max_pixels)
    while head := line.recv(_JOB.size, socket.MSG_WAITALL):
        (length,) = _JOB.unpack(head)
        data = line.recv(length, socket.MSG_WAITALL)
        if len(data) < length:
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # its signal, unhandled, ends the process
        answer = _answer(data, image_size, quality, max_pixels)
        signal.setitimer(signal.ITIMER_PROF, 0)
        line.sendall(answer)


def _limit_self(max_pixels: int) -> None:
    """Once all of Pillow is loaded nothing needs to be opened, and nothing can be any more."""
    from PIL import Image

    Image.init()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is our parent's to answer
    memory = BASE_BYTES + BYTES_PER_PIXEL * max_pixels
    for kind, most in [
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),
    ]:
        resource.setrlimit(kind, (most, most))


def _answer(data: bytes, image_size: int, quality: int, max_pixels: int) -> bytes:
    try:
        jpg, *sizes = canonical_jpeg(data, image_size, quality, max_pixels)
        return _HEAD.pack(_OK, *sizes, len(jpg)) + jpg
    except Undecodable as error:
        outcome, reason = _UNDECODABLE, error
    except NotAnImage as error:
        outcome, reason = _NOT_AN_IMAGE, error
    except TooManyPixels as error:
        outcome, reason = _TOO_LARGE, error
    text = str(reason)[:_LONGEST_REASON].encode(errors="replace")
    return _HEAD.pack(outcome, 0, 0, 0, 0, len(text)) + text
