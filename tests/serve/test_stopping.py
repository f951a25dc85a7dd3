"""The two ends of a service: not ready until it can answer, and at its end every accepted request answered."""

import base64
import http.client
import json
import signal
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from tests.serve.conftest import ServiceProcess
from tests.serve.wire import JSON, connect, post, receive, request, send

OUTSTANDING = 50
DELAY_S = 2.0


def status_of(url, path):
    """The status that a GET has, or None where nobody takes the connection or nobody answers on it."""
    try:
        with urllib.request.urlopen(url + path, timeout=20) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


class Watch:
    """Asks a probe every 0.1 s, however long each answer takes, until the block ends; `seen` has (second, status)."""

    def __init__(self, url, path):
        self._ended = threading.Event()
        self._url, self._path = url, path
        self._thread = threading.Thread(target=self._run)
        self.seen = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def first(self, status):
        """When what was asked got that answer first."""
        return min(second for second, seen in self.seen if seen == status)

    def _run(self):
        with ThreadPoolExecutor(64) as threads:
            while not self._ended.wait(0.1):
                threads.submit(self._ask, time.monotonic())
        self.seen.sort(key=lambda each: each[0])

    def _ask(self, second):
        self.seen.append((second, status_of(self._url, self._path)))


def outstanding_requests(service, encoded):
    """Requests that are accepted and not answered: the end of each body is to come. Gives connections and ends."""
    texts = {"input": [f"text {i}" for i in range(150)], "encoding_format": "base64"}
    image = {"images": [encoded(i) for i in range(8)], "labels": ["a", "b"]}
    connections = []
    for i in range(OUTSTANDING):
        data = post("/v1/embeddings", texts) if i % 2 else post("/v1/zero-shot", image)
        connection = connect(service.url, 90)
        connection.sendall(data[:-10])
        connections.append((connection, data[-10:]))
    return connections


def num_running(service):
    lines = send(service.url, request("GET", "/metrics")).body.decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("rayclip_requests_running{"))


def stop_under_load(service, encoded, number=signal.SIGTERM):
    """Stop a service while it answers; returns what became of the requests, of later ones, and of readiness."""
    while "answers at" not in service.log.read_text():  # it may do so before: by a proxy that stands in at the start
        time.sleep(0.1)
    connections = outstanding_requests(service, encoded)
    deadline = time.monotonic() + 30
    while num_running(service) < OUTSTANDING and time.monotonic() < deadline:
        time.sleep(0.05)
    at_signal = num_running(service)
    with Watch(service.url, "/readyz") as ready, Watch(service.url, "/livez") as alive:
        for connection, rest in connections[: OUTSTANDING // 2]:  # these are being computed, the others still come
            connection.sendall(rest)
        service.process.send_signal(number)
        signalled = time.monotonic()
        with ThreadPoolExecutor(OUTSTANDING) as threads:

            def finish(place):
                connection, rest = connections[place]
                if place >= OUTSTANDING // 2:
                    time.sleep(2 * DELAY_S)  # the door is closed by then
                    connection.sendall(rest)
                return receive(connection), time.monotonic()

            answers = list(threads.map(finish, range(OUTSTANDING)))
        code = service.process.wait(90)
    return {
        "running at the signal": at_signal,
        "statuses": [answer.status for answer, _ in answers],
        "bodies": [json.loads(answer.body) for answer, _ in answers if answer.status == 200],
        "last answer": max(at for _, at in answers) - signalled,
        "not ready": ready.first(503) - signalled,
        "refused": ready.first(None) - signalled,
        "ready": [status for second, status in ready.seen if second >= signalled],
        "alive": [status for second, status in alive.seen if second >= signalled],
        "ended": time.monotonic() - signalled,
        "code": code,
    }


def without_repeats(statuses):
    return [*(a for a, b in pairwise(statuses) if a != b), *statuses[-1:]]


@pytest.mark.chaos
def test_sigterm_answers_what_was_accepted_and_readiness_goes_first(tmp_path, model_folder, encoded):
    service = ServiceProcess(
        tmp_path,
        f"model={model_folder}",
        "poll_s=0.3",
        f"stop_delay_s={DELAY_S}",
        # A text at a time: the tiny model is so fast that nothing would be outstanding otherwise.
        "text_encoder.max_batch_size=1",
        "text_encoder.max_waiting=50000",
        "image_encoder.max_batch_size=1",
    )
    with Watch(service.url, "/readyz") as starting:
        service.wait()
    try:
        check_start_and_end(service, starting, encoded)
    finally:
        service.process.kill()


def check_start_and_end(service, starting, encoded):
    statuses = without_repeats([status for _, status in starting.seen])
    # Nobody listens yet, then it is being loaded, then it is ready, and no other answer meanwhile.
    assert statuses[0] is None and 503 in statuses, statuses
    assert set(statuses) <= {None, 503, 200} and statuses.count(200) == 1, statuses

    found = stop_under_load(service, encoded)
    assert found["running at the signal"] >= OUTSTANDING
    assert found["statuses"] == [200] * OUTSTANDING
    assert all(len(body.get("data", body.get("results"))) in (8, 150) for body in found["bodies"])
    assert found["code"] == 143
    # Balancers are told before the first connection is refused, and then nothing is cut off.
    assert found["not ready"] < found["refused"]
    assert set(without_repeats(found["ready"])) <= {200, 503, None}
    assert without_repeats(found["alive"])[0] == 200 and 503 not in found["alive"]
    log = service.log.read_text()
    assert "stopping: " in log and "Traceback" not in log


def test_a_signal_while_it_starts_ends_it(tmp_path, model_folder):
    service = ServiceProcess(tmp_path, f"model={model_folder}")
    while "starting" not in service.log.read_text():
        time.sleep(0.1)
        assert service.process.poll() is None
    time.sleep(1)
    service.process.terminate()
    assert service.process.wait(90) == 143
    assert "Traceback" not in service.log.read_text()


def test_headers_that_never_end_are_not_waited_for(service):
    connections = [connect(service.url, 60) for _ in range(5)]
    for connection in connections:
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nX-A: ")
    for _ in range(60):  # a byte now and then must not keep it waiting
        time.sleep(0.5)
        try:
            for connection in connections:
                connection.sendall(b"a")
        except OSError:
            break  # it hung up
    else:
        raise AssertionError("it is still waiting after 30 s")
    for connection in connections:
        connection.close()
    assert service.ask("POST", "/v1/embeddings", {"input": "a"})[0] == 200


def test_what_is_slow_but_comes_is_answered(service):
    data = post("/v1/embeddings", {"input": base64.b64encode(b"a" * 40).decode()}, JSON)
    with connect(service.url, 60) as connection:
        for start in range(0, len(data), 40):
            connection.sendall(data[start : start + 40])
            time.sleep(0.1)
        assert receive(connection).status == 200
