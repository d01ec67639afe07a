"""What a daemon shows over HTTP: who may ask for what, what is said, and what is not."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from blocks import ids, save
from watched import NAME, PATIENCE, Watched, exchange, get, told, traffic, watched

import kvstore
from kvstore import BadInput
from kvstore.daemon.failures import KEPT, LONGEST, Failures
from kvstore.daemon.http import Monitor
from kvstore.daemon.trend import Trend
from kvstore.daemon.watched import SessionInfo
from kvstore.settings.address import Address

log = logging.getLogger("kvstore")


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Watched, Monitor]]:
    with watched(tmp_path, every=0.02) as pair:
        yield pair


# -- who may ask for what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/", "/metrics", "/healthz", "/api/status", "/nothing"])
def test_where_health_is_served_there_is_no_name_and_nothing_else(both: Any, path: str) -> None:
    held, monitor = both
    held.why = f"the directory of {NAME} is full"
    status, _, body = get(monitor, path, "health")
    assert status == {"/livez": 200, "/readyz": 503}.get(path, 404)
    assert NAME.encode() not in body and len(body) < 40
    held.why = ""
    assert get(monitor, "/readyz", "health")[0] == 200


def test_health_on_loopback_says_why(both: Any) -> None:
    held, monitor = both
    assert [get(monitor, path)[0] for path in ("/healthz", "/livez", "/readyz", "/nothing")] == [200, 200, 200, 404]
    held.why = "the disk is full"
    assert get(monitor, "/healthz")[::2] == (503, b"the disk is full\n")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("LOCALHOST", 200),
        ("[::1]:{port}", 200),
        ("evil.example:{port}", 421),
        ("evil.example", 421),
        ("127.0.0.1:1", 421),
        ("127.0.0.1.evil.example", 421),
        ("127.0.0.1:{port}@evil.example", 421),
        ("", 421),
    ],
)
@pytest.mark.parametrize("path", ["/metrics", "/api/status"])
def test_names_that_lead_here_by_others_word_are_refused(both: Any, host: str, status: int, path: str) -> None:
    _, monitor = both
    name = host.format(port=monitor.addresses["http"][1])
    found, headers, body = get(monitor, path, headers={"Host": name})
    assert found == status
    assert (NAME.encode() in body) is (status == 200)
    assert not any(name.startswith("access-control-") for name in headers)


@pytest.mark.parametrize("path", ["/", "/metrics", "/api/status", "/livez", "/nothing"])
def test_headers_that_keep_other_pages_out(both: Any, path: str) -> None:
    _, headers, _ = get(both[1], path, headers={"Origin": "https://evil.example"})
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert headers["cross-origin-resource-policy"] == "same-origin" and headers["cache-control"] == "no-store"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ") and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and not any(name.startswith("access-control-") for name in headers)


def test_head_says_what_get_would_without_a_body(both: Any) -> None:
    for path in ("/", "/metrics", "/healthz", "/nothing"):
        full, only = get(both[1], path), get(both[1], path, method="HEAD")
        assert (only[0], only[2]) == (full[0], b"")
        assert only[1]["content-type"] == full[1]["content-type"]
        if path != "/metrics":
            assert int(only[1]["content-length"]) == len(full[2])


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get"])
@pytest.mark.parametrize("which", ["http", "health"])
def test_nothing_can_be_changed(both: Any, method: str, which: str) -> None:
    status, headers, _ = get(both[1], "/livez", which, method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org"])
def test_pages_that_others_would_reach_are_refused(host: str) -> None:
    with pytest.raises(BadInput, match="from outside"):
        Monitor(Watched({}, Failures()), Address(host, 0), None, "")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_loopback_has_several_names(host: str) -> None:
    monitor = Monitor(Watched({}, Failures()), Address(host, 0), None, "")
    monitor.start()
    try:
        assert get(monitor, "/livez", headers={"Host": "localhost"})[0] == 200
        assert ip_address(monitor.addresses["http"][0]).is_loopback
    finally:
        monitor.close()


def test_an_address_that_is_taken_is_an_error_and_leaves_nothing_behind(both: Any) -> None:
    host, port = both[1].addresses["health"]
    other = Monitor(Watched({}, Failures()), Address("127.0.0.1", 0), Address(host, port), "")
    with pytest.raises(BadInput, match="cannot be had"):
        other.start()
    other.close()
    assert not other._thread.is_alive() and not other._pool._threads  # those of other monitors come and go


def test_a_monitor_without_listeners_and_one_that_never_starts() -> None:
    never = Monitor(Watched({}, Failures()), Address("127.0.0.1", 0), None, "")
    never.close()
    idle = Monitor(Watched({}, Failures()), None, None, "")
    idle.start()
    assert idle.addresses == {}
    idle.close()
    idle.close()


# -- what is said -----------------------------------------------------------------------------------------------------


def test_status_is_what_the_stores_say(both: Any) -> None:
    held, monitor = both
    log.warning("a block on disk is dropped:\n %s", "checksum of layer 3 differs")
    status = told(monitor, "/api/status")
    assert status["version"] == kvstore.__version__ and status["not_ready"] == ""
    assert status["tenants"].keys() == {"", NAME}
    for tenant, store in held.stores.items():
        own = store.stats()
        assert status["tenants"][tenant]["tiers"] == own["tiers"]
        assert status["tenants"][tenant]["counters"]["host_hit_tokens"] == own["counters"]["host_hit_tokens"] > 0
    assert [session["tenant"] for session in status["sessions"]] == ["", NAME]
    session = SessionInfo(**status["sessions"][1])
    assert session == SessionInfo(8, NAME, 1001, 4001, session.since, 3, 1, 1 << 20)
    assert [one["what"] for one in status["failures"]] == ["a block on disk is dropped: checksum of layer 3 differs"]


def test_segments_of_all_tenants_those_that_served_most_first(both: Any) -> None:
    held, monitor = both
    busy = ids(3, 43)
    for _ in range(9):
        traffic(held.stores[""], busy)
    listed = told(monitor, "/api/segments?limit=1000")["segments"]
    assert listed[0]["store"] == "" and listed[0]["tokens"] == len(busy) and listed[0]["uses"] >= 10
    assert {segment["store"] for segment in listed} == {"", NAME}
    own = [segment for store in held.stores.values() for segment in store.segments()]
    assert {segment["id"] for segment in listed} == {segment.id for segment in own}
    assert told(monitor, "/api/segments?limit=2")["segments"] == listed[:2]


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", "1e2", "%31x"])
def test_limits_that_are_none_are_refused(both: Any, limit: str) -> None:
    assert get(both[1], f"/api/segments?limit={limit}")[0] == 400


def test_history_goes_on_from_where_a_page_is(both: Any) -> None:
    held, monitor = both
    turned = threading.Event()
    first = samples(monitor, 2, turned)
    traffic(held.stores[NAME], ids(10, 40))
    later = samples(monitor, 2, turned, first["at"][-1])
    assert later["at"][0] > first["at"][-1]
    whole = told(monitor, "/api/history")
    assert whole["at"][: len(first["at"])] == first["at"]
    assert whole["asked"][-1] - first["asked"][0] >= 48 and whole["hits"]["host"][-1] - first["hits"]["host"][0] >= 40
    used = [store.stats()["tiers"]["host"]["used"] for store in held.stores.values()]
    assert whole["used"]["host"][-1] == sum(used) > 0
    assert get(monitor, "/api/history?since=x")[0] == 400


def samples(monitor: Monitor, count: int, turned: threading.Event, since: float = 0.0) -> Any:
    """Waits for so many samples."""
    for _ in range(int(PATIENCE / 0.02)):
        history = told(monitor, f"/api/history?since={since}")
        if len(history["at"]) >= count:
            return history
        turned.wait(0.02)
    raise AssertionError("no samples come")


def test_a_store_that_is_closed_is_left_out(both: Any) -> None:
    held, monitor = both
    held.stores[NAME].close()
    assert told(monitor, "/api/status")["tenants"].keys() == {""}
    assert get(monitor, "/metrics")[0] == 200
    assert get(monitor, "/livez")[0] == 200


def test_the_page_runs_its_own_script_and_style_only(both: Any) -> None:
    _, headers, body = get(both[1], "/")
    policy, text = headers["content-security-policy"], body.decode()
    assert "script-src 'sha256-" in policy and "style-src 'sha256-" in policy and "connect-src 'self'" in policy
    assert len(re.findall("<script", text)) == len(re.findall("<style", text)) == 1
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|@import|url\(| on\w+=", text)


# -- the parts of it --------------------------------------------------------------------------------------------------


def test_failures_are_bounded_lines_of_warnings_only() -> None:
    failures = Failures()
    failures.attach()
    try:
        log.info("all is well")
        logging.getLogger("elsewhere").error("not ours")
        for turn in range(KEPT + 5):
            log.warning("number %d\nof many %s", turn, "x" * LONGEST)
        failures.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",), "levelno": logging.ERROR}))
        try:
            raise OSError("secret")
        except OSError:
            logging.getLogger("kvstore.daemon").exception("a job failed")
        recent = failures.recent()
        assert len(recent) == KEPT and recent[0][1].startswith("number 7 of many x")
        assert max(len(text) for _, text in recent) == LONGEST
        assert [text for _, text in recent[-2:]] == ["%d", "a job failed: OSError"]
        assert [at for at, _ in recent] == sorted(at for at, _ in recent)
    finally:
        failures.close()
    log.warning("after the end")
    assert failures.recent() == recent


def test_a_trend_keeps_the_latest_samples() -> None:
    trend = Trend(kept=3)
    for at in range(5):
        counters = {"asked_tokens": 10 * at, "host_hit_tokens": at}
        trend.take(float(at), [{"counters": counters, "tiers": {"host": {"used": 7}}}] * 2)
    kept = trend.since(0.0)
    assert (kept["at"], kept["asked"], kept["hits"]["host"]) == ([2.0, 3.0, 4.0], [40, 60, 80], [4, 6, 8])
    assert kept["used"] == {"device": [0] * 3, "host": [14] * 3, "disk": [0] * 3, "remote": [0] * 3}
    assert trend.since(3.0)["at"] == [4.0]


def test_requests_that_are_none_are_refused_and_the_next_is_served(both: Any) -> None:
    _, monitor = both
    for sent, status in (
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n more\r\n\r\n", 400),
        (b"GET http://localhost/livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /livez HTTP/2\r\nHost: localhost\r\n\r\n", 400),
        (b"GET  /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET /api/segments?" + b"&".join(b"a=1" for _ in range(20)) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    ):
        assert exchange(monitor, sent).startswith(b"HTTP/1.1 %d " % status), sent


def test_an_answer_while_others_save(both: Any) -> None:
    held, monitor = both
    over = threading.Event()

    def work() -> None:
        for turn in range(40):
            save(held.stores[NAME], ids(500 + turn, 64))
        over.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not over.is_set():
        assert told(monitor, "/api/status")["tenants"][NAME]["tiers"]["host"]["blocks"] > 0
    thread.join()
