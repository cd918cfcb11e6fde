"""The benchmark measures what it says, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).with_name("benchmark.py")
PYTHON = sys.executable, "-W", "error"


def run(*args, **environment):
    return subprocess.run(
        [*PYTHON, BENCHMARK, *args],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )


def left_in(db):
    db.execute("SHOW DATABASES LIKE 'cache_aside_benchmark%'")
    return db.fetchall()


def test_an_unknown_part_is_named():
    ended = run("--only", "ttl,crowds", "--only", "speed")
    assert ended.returncode == 2
    assert "no such part: crowds, speed; there are empty, limit" in ended.stderr


def test_all_parts_are_measured_and_only_what_is_its_own_is_removed(
    cache, db, tmp_path
):
    cache.hset("planet:1", "name", "not the benchmark's")
    cache.set("SELECT * FROM planet", "neither")
    ended = run("--quick", "--json", tmp_path / "results.json")
    assert (ended.returncode, ended.stderr) == (0, "")

    assert left_in(db) == ()
    assert sorted(cache.keys()) == [b"SELECT * FROM planet", b"planet:1"]
    assert cache.hgetall("planet:1") == {b"name": b"not the benchmark's"}
    assert cache.get("SELECT * FROM planet") == b"neither"

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["quick"]
    assert [row["query"] for row in results["empty"]] == [
        *["1 row by its key", "8 rows", "200 rows", "costly query"]
    ]
    assert all(row["hit"]["median_ms"] > 0 for row in results["empty"])
    wire = results["limit"]["wire"]
    assert [row["hit"].pop("HGETALL", 0) for row in wire] == [1, 0, 0]
    assert [row["hit"].pop("GET", 0) for row in wire] == [0, 1, 1]
    assert all(set(row["hit"]) == {"sent_bytes", "received_bytes"} for row in wire)
    assert all(row["miss"]["sent_bytes"] > row["hit"]["sent_bytes"] for row in wire)
    queries = {(row["way"], row["callers"]): row["queries"] for row in results["crowd"]}
    assert queries["sample", 4] == {"median": 1, "farthest": 0}
    assert queries["plain", 4]["median"] > 1
    assert [row["ttl_s"] for row in results["ttl"]] == [1, 2, 5, 10, 30, 60, 120, 300]
    eviction = {row["policy"]: row["writes_refused"] for row in results["eviction"]}
    assert len(eviction) == 6
    assert [policy for policy in eviction if eviction[policy]] == ["noeviction"]
    assert max(map(len, ended.stdout.splitlines())) <= 100


@pytest.mark.parametrize("moment", ["while it fills its tables", "while it measures"])
def test_interrupted_it_still_removes_what_is_its_own(cache, db, moment):
    process = subprocess.Popen(
        [*PYTHON, BENCHMARK, "--only", "empty"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    measures = "measures" in moment  # and has stored something
    begun = (lambda: len(cache.keys()) > 1) if measures else (lambda: left_in(db))
    while not begun() and process.poll() is None:
        time.sleep(0.005)
    while process.poll() is None:  # the impatient press it again
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert process.returncode == 130
    assert (left_in(db), cache.keys()) == ((), [])


def test_it_says_so_if_it_may_not_create_a_database(cache, db):
    db.execute("CREATE USER reader@'%' IDENTIFIED BY 'secret'")
    try:
        db.execute("GRANT SELECT ON tutorial.* TO reader@'%'")
        ended = run("--only", "crowd", DB_USER="reader", DB_PASS="secret")
    finally:
        db.execute("DROP USER reader@'%'")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "it takes the right to CREATE and DROP a database" in ended.stderr


def test_the_simulation_agrees_with_the_formula(tmp_path):
    # No servers are needed for it.
    nowhere = {"REDIS_URL": "", "DB_HOST": "", "LOCAL_REDIS": "/nonexistent"}
    ended = run("--quick", "--only", "ttl", "--json", tmp_path / "results", **nowhere)
    assert (ended.returncode, ended.stderr) == (0, "")
    # A key wanted n times in a TTL is a miss once and a hit n times.
    ranks = range(1, 301)
    total = sum(1 / rank for rank in ranks)
    for row in json.loads((tmp_path / "results").read_text())["ttl"]:
        wanted = [row["ttl_s"] * 100 / rank / total for rank in ranks]
        hits = sum(n / (1 + n) / rank for n, rank in zip(wanted, ranks)) / total
        assert row["hits_percent"]["median"] == pytest.approx(100 * hits, abs=2)
        assert row["queries_per_s"] == pytest.approx(100 * (1 - hits), abs=2)


def test_without_a_redis_server_to_start_eviction_says_so_and_stops():
    ended = run("--quick", "--only", "eviction", LOCAL_REDIS="/nonexistent")
    assert ended.returncode == 1
    assert ended.stderr.startswith("benchmark.py: eviction: stopped: not a server")
    assert ended.stderr.count("\n") == 1
