"""S3 on loopback that goes wrong: a proxy before a server, at a seeded rate."""

import http.client
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

READ_FAULTS = ("error_500", "dropped", "slow_body", "cut_body")
WRITE_FAULTS = ("error_500", "dropped", "lost_answer")
FAULTS = (*READ_FAULTS, "empty_listing", "lost_answer")
_EMPTY = b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"
_ERROR = b"<Error><Code>InternalError</Code><Message>try again</Message></Error>"


class FaultyProxy:
    """Forwards to `target`; a share `rate` of the requests of `commands` goes wrong in one of FAULTS. Counted."""

    def __init__(
        self, target: str, rate: float = 0.0, seed: int = 0, slow_s: float = 3.0, commands: tuple[str, ...] = ("GET",)
    ) -> None:
        self.rate, self.slow_s, self.commands = rate, slow_s, commands
        self.num_requests, self.faults = 0, dict.fromkeys(FAULTS, 0)
        self._random, self._lock = random.Random(seed), threading.Lock()
        host, proxy = urlsplit(target).netloc, self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def _forward(self) -> None:
                fault = proxy.draw(self.command, self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if fault == "dropped":
                    self.close_connection = True
                    return
                if fault == "error_500":
                    self._answer(500, {}, _ERROR)
                    return
                upstream = http.client.HTTPConnection(host, timeout=30)
                upstream.request(self.command, self.path, body or None, dict(self.headers))
                answer = upstream.getresponse()
                data = answer.read()
                upstream.close()
                if fault == "lost_answer":
                    self.close_connection = True
                    return
                if fault == "empty_listing":
                    data = _EMPTY
                self._answer(answer.status, dict(answer.getheaders()), data, fault)

            def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: str | None = None) -> None:
                self.send_response(status)
                dropped = {"content-length", "connection", "transfer-encoding", "date", "server"}
                for name, value in headers.items():
                    if name.lower() not in dropped:
                        self.send_header(name, value)
                length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if fault in ("cut_body", "slow_body"):
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    if fault == "cut_body":
                        self.close_connection = True
                        return
                    time.sleep(proxy.slow_s)
                    data = data[len(data) // 2 :]
                self.wfile.write(data)

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (TimeoutError, ConnectionError):
                    self.close_connection = True

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def draw(self, command: str, path: str) -> str | None:
        """The fault of one request, None for most."""
        with self._lock:
            self.num_requests += 1
            if command not in self.commands or self._random.random() >= self.rate:
                return None
            reads = (*READ_FAULTS, "empty_listing") if "list-type=2" in path else READ_FAULTS
            fault = self._random.choice(reads if command == "GET" else WRITE_FAULTS)
            self.faults[fault] += 1
            return fault

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()
