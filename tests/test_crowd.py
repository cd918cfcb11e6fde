"""One query at a time: what reaches MySQL and Redis when many want the same."""

import contextlib
import time

import pymysql
import pytest
from conftest import servers
from tools import Sent, Worker, begin, outcomes, selects, start_crowd, wait_until

MERCURY = {"id": 1, "name": "Mercury"}
SLOW = "SELECT 'slow' AS speed, SLEEP(0.2) AS slept"


@pytest.fixture(scope="module")
def workers(redis_server, mysql_server):
    """Four processes; a crowd is 25 threads in each."""
    environment = servers.environment(redis_server, mysql_server)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Worker(environment)) for _ in range(4)]


@contextlib.contextmanager
def slow(db, seconds=0.2):
    """Make whoever asks for planets meanwhile wait for the end of it, and longer."""
    db.execute("LOCK TABLES planet WRITE")
    try:
        yield
        time.sleep(seconds)
    finally:
        db.execute("UNLOCK TABLES")


def assert_all_have(answer, results, seconds=1):
    assert len(results) == 100
    assert [result.get("answer") for result in results] == [answer] * 100
    assert max(result["seconds"] for result in results) < seconds


# ---------------------------------------------------------------- a crowd


def test_a_crowd_at_a_cold_query_is_one_select(workers, cache, db):
    before = selects(db)
    start_crowd(workers, "fetch", SLOW)
    assert_all_have([{"speed": "slow", "slept": 0}], outcomes(workers))
    assert selects(db) == before + 1
    assert 0 < cache.ttl(SLOW) <= 10


@pytest.mark.parametrize(
    ("function", "argument", "answer"),
    [
        ("planet", 1, MERCURY),
        ("planet", 99, None),
        ("fetch", "SELECT * FROM planet WHERE id = 1", [MERCURY]),
        ("fetch", "SELECT * FROM planet WHERE id = 99", []),
    ],
    ids=["planet", "absent planet", "rows", "no rows"],
)
def test_a_crowd_at_what_a_slow_database_has_or_has_not_is_one_select(
    function, argument, answer, workers, cache, db
):
    before = selects(db)
    with slow(db):
        start_crowd(workers, function, argument)
    assert_all_have(answer, outcomes(workers), 1.2)
    assert selects(db) == before + 1
    # All of it came from that one question, and who comes now asks none.
    start_crowd(workers, function, argument)
    assert_all_have(answer, outcomes(workers))
    assert selects(db) == before + 1


def test_crowds_at_different_keys_do_not_wait_for_each_other(workers, cache, db):
    before = selects(db)
    with slow(db, 0.6):
        start_crowd(workers[:1], "planet", 1)
        start_crowd(workers[1:], "fetch", "SELECT 1 AS one")
        results = outcomes(workers[1:])
        assert [result["answer"] for result in results] == [[{"one": 1}]] * 75
        assert selects(db) == before + 2
    assert [result["answer"] for result in outcomes(workers[:1])] == [MERCURY] * 25
    assert selects(db) == before + 2


def test_nothing_remains_of_the_lock(workers, cache):
    start_crowd(workers, "fetch", SLOW)
    outcomes(workers)
    assert cache.keys() == [SLOW.encode()]


# ---------------------------------------------------------------- a query that fails


def test_if_the_caller_that_loads_fails_the_next_one_tries(workers, cache, db):
    # MySQL sleeps for the one row, and only then finds the number too large.
    sql = "SELECT SLEEP(0.3), EXP(1000 * id) FROM planet WHERE name = 'Mercury'"
    before = selects(db)
    start_crowd(workers[:2], "fetch", sql, threads=2)
    results = outcomes(workers[:2])
    assert all("error" in result for result in results)
    assert selects(db) == before + 4
    assert 1.1 < max(result["seconds"] for result in results) < 3  # one after the other
    assert not cache.exists(sql, f"lock:{sql}")


def test_a_crowd_at_a_query_that_fails_does_not_wait_for_ever(example, cache, db):
    example.MAX_WAIT = 0.5
    sql = "SELECT SLEEP(0.3), EXP(1000 * id) FROM planet WHERE name = 'Mercury'"

    def failed_fetch():
        with pytest.raises(pymysql.Error):
            example.fetch(sql)

    start = time.monotonic()
    calls = [begin(failed_fetch) for _ in range(25)]
    [call.result(30) for call in calls]
    assert time.monotonic() - start < 3  # 7.5 if one after the other


def test_a_query_that_failed_is_queried_again_at_once(example, cache, db):
    sql = "SELECT name FROM moon"
    with pytest.raises(pymysql.Error):
        example.fetch(sql)
    assert not cache.keys()
    db.execute("CREATE TABLE moon (name VARCHAR(30))")
    db.execute("INSERT INTO moon VALUES ('Moon')")
    start = time.monotonic()
    assert example.fetch(sql) == [{"name": "Moon"}]
    assert time.monotonic() - start < 1


# ---------------------------------------------------------------- a loader that is gone


def test_a_lock_whose_owner_is_gone_is_waited_for_and_no_longer(example, cache, db):
    example.planet(2)
    with slow(db, 0):
        dead = begin(example.planet, 1)
        wait_until(lambda: cache.exists("lock:planet:1"))
        assert 0 < cache.pttl("lock:planet:1") <= 1000 * example.LOCK_TTL
    dead.result(10)
    cache.delete("planet:1")
    cache.set("lock:planet:1", "of one who was killed", px=700)
    before = selects(db)
    start = time.monotonic()
    others = [begin(example.planet, 1) for _ in range(25)]
    assert [other.result(10) for other in others] == [MERCURY] * 25
    assert 0.5 < time.monotonic() - start < 2
    assert selects(db) == before + 1


def test_after_max_wait_a_caller_loads_without_the_lock_and_does_not_store(
    example, cache
):
    example.MAX_WAIT = 0.5
    cache.set("lock:planet:1", "of another process")
    start = time.monotonic()
    assert example.planet(1) == MERCURY
    assert 0.4 < time.monotonic() - start < 2
    assert cache.keys() == [b"lock:planet:1"]


# ---------------------------------------------------------------- the cost


def cost(sent):
    """What was sent, besides MULTI and EXEC."""
    return [word for word in sent.commands if word not in {"MULTI", "EXEC"}]


@pytest.mark.parametrize(
    ("function", "argument", "key"),
    [
        ("fetch", "SELECT name FROM planet WHERE id = 1", None),
        ("fetch", "SELECT name FROM planet WHERE id = 99", None),
        ("planet", 1, "planet:1"),
        ("planet", 99, "planet:99"),
    ],
    ids=["fetch", "no rows", "planet", "absent planet"],
)
def test_a_miss_costs_eight_commands_at_most_and_a_hit_one(
    function, argument, key, example, cache, db
):
    technique = getattr(example, function)
    technique(argument)  # connects, and makes the lock's script known
    cache.flushdb()
    before = selects(db)
    with Sent(cache) as miss:
        technique(argument)
    assert selects(db) == before + 1
    assert 3 <= len(cost(miss)) <= 8, miss.commands
    assert cache.exists(key or argument)
    for _ in range(3):
        with Sent(cache) as hit:
            technique(argument)
        assert hit.commands == ["GET" if function == "fetch" else "HGETALL"]
    assert selects(db) == before + 1
