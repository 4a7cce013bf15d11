"""Atomic writes: whoever reads a file, after a kill as well, finds the old one or the new one."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file under a temporary name of its own, and renames it when all is written.

    Args:
      path: the file; what it held is replaced.
      write: writes the contents to an open binary file. If it raises, `path` stays as it was.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "file"
      >>> write_whole(path, lambda file: file.write(b"new"))
      >>> path.read_bytes()
      b'new'
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
