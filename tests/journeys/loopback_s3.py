"""An S3-compatible object store on 127.0.0.1: what TensorStore asks of one, kept in memory.

GET (whole or a range), HEAD, PUT and DELETE of an object in path style, and the version 2 listing in small pages, as
the REST API of Amazon S3 (2006-03-01) describes them. Signatures are not checked.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 3
"""Keys of a page of a listing; S3 gives a thousand."""
NAMES = "http://s3.amazonaws.com/doc/2006-03-01/"


class LoopbackS3(ThreadingHTTPServer):
    """The store."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, bytes] = {}
        """By `bucket/key`."""
        self.asked: list[tuple[str, str]] = []
        """Method and path of every request."""
        self.refuse: dict[str, list[int]] = {}
        """By method, statuses that its next requests get instead."""
        self.lock = threading.Lock()

    def listing(self, bucket: str, prefix: str, after: str) -> str:
        """A page of the keys of a bucket that begin with a prefix and come after another key."""
        keys = sorted(key.partition("/")[2] for key in self.objects if key.startswith(f"{bucket}/{prefix}"))
        left = [key for key in keys if key > after]
        page, more = left[:PAGE], len(left) > PAGE
        rows = "".join(f"<Contents><Key>{escape(key)}</Key><Size>1</Size></Contents>" for key in page)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        end = f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(page)}</KeyCount>"
        return f'<?xml version="1.0"?><ListBucketResult xmlns="{NAMES}">{end}{rows}{token}</ListBucketResult>'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackS3

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.asked.append((self.command, self.path))
            failures = self.server.refuse.get(self.command)
            status, content, headers = (failures.pop(0), b"<Error/>", {}) if failures else self._outcome(body)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_DELETE = _serve

    def _outcome(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        parts = urlsplit(self.path)
        query, key = parse_qs(parts.query), unquote(parts.path).strip("/")
        if "list-type" in query:
            after = query.get("continuation-token", [""])[0]
            return 200, self.server.listing(key, query.get("prefix", [""])[0], after).encode(), {}
        if self.command == "PUT":
            self.server.objects[key] = body
            return 200, b"", {"ETag": _tag(body)}
        if self.command == "DELETE":
            self.server.objects.pop(key, None)
            return 204, b"", {}
        found = self.server.objects.get(key)
        if found is None:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
        if self.headers.get("If-None-Match") in ("*", _tag(found)):
            return 304, b"", {}
        if self.headers.get("If-Match", "*") not in ("*", _tag(found)):
            return 412, b"", {}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, found, {"ETag": _tag(found)}
        first, last = asked.groups()
        start = int(first) if first else max(0, len(found) - int(last))
        stop = min(int(last) + 1, len(found)) if first and last else len(found)
        return 206, found[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(found)}", "ETag": _tag(found)}

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the console."""


def _tag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


@contextmanager
def loopback_s3() -> Iterator[LoopbackS3]:
    """A store for the time of the context."""
    with LoopbackS3() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
