"""TensorBoard's copy of the metrics, written with every line.

tensorboardX's SummaryWriter writes in a thread of its own. On a full disk the thread ends, and the
run would wait for it for ever; so the file is written here, in the caller's thread.
"""

import pathlib
import socket
import struct
import time
from collections.abc import Mapping

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore
from tensorboardX.record_writer import masked_crc32c


class Events:
    """A file of events in a folder, which is made where there is none.

    Args:
      folder: TensorBoard's log directory.
      first_step: what earlier files hold from this step on, TensorBoard forgets.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{first_step}"
        self.path = folder / name
        self._file = open(self.path, "ab")  # noqa: SIM115 (open as long as the run)
        self._write(Event(file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.SessionStatus.START)
        self._write(Event(step=first_step, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one value under each name."""
        summary = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=summary)))

    def image(self, step: int, name: str, shape: tuple[int, ...], png: bytes) -> None:
        """Writes a picture `[height, width, channel]`, given as a PNG."""
        height, width, channels = shape
        picture = Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png
        )
        summary = Summary(value=[Summary.Value(tag=name, image=picture)])
        self._write(Event(step=step, summary=summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        """A record: its length, its bytes, and a checksum of either."""
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self._file.write(length + next(sums) + data + next(sums))
        self._file.flush()
