"""Atomic writes, so that a kill leaves the old file or the new one, and SHA-256."""

import hashlib
import os
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


def hash_bytes(content: Any) -> str:
    """SHA-256 of bytes, or of what has a buffer of them, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
