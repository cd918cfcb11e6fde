"""One question at a time: what MySQL and Redis are asked when many want the same."""

import contextlib
import time

import pymysql
import pytest
from conftest import load, servers
from tools import Sent, Worker, begin, outcomes, plant, selects, start_crowd, wait_until

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


def test_a_crowd_at_a_cold_query_with_arguments_is_one_select_for_each_of_them(
    workers, cache, db
):
    before = selects(db)
    sql = "SELECT %s AS number, SLEEP(0.2) AS slept"
    start_crowd(workers[:2], "fetch", sql, [1])
    start_crowd(workers[2:], "fetch", sql, [2])
    one, two = outcomes(workers[:2]), outcomes(workers[2:])
    assert [result["answer"][0]["number"] for result in one + two] == [1] * 50 + [
        2
    ] * 50
    assert selects(db) == before + 2


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


def test_a_crowd_meets_an_expired_key_and_asks_once_each_time(workers, cache, db):
    before = selects(db)
    for round in range(1, 4):
        start_crowd(workers, "planet", 1)
        assert_all_have(MERCURY, outcomes(workers))
        assert selects(db) == before + round
        cache.delete("planet:1")


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


# ---------------------------------------------------------------- a question that fails


def test_a_crowd_at_a_query_that_fails_does_not_fail_one_after_the_other(
    workers, cache, db
):
    # It sleeps for the one row, and only then finds the number too large.
    sql = "SELECT SLEEP(1), EXP(1000 * id) FROM planet WHERE name = 'Mercury'"
    start_crowd(workers, "fetch", sql, threads=10)
    results = outcomes(workers)
    assert {result.get("error") for result in results} <= {
        "DataError",
        "OperationalError",
    }
    assert 1 < min(result["seconds"] for result in results)
    assert max(result["seconds"] for result in results) < 6  # not 40
    assert not cache.exists(sql)


def test_a_query_that_fails_is_not_cached_and_asked_again_at_once(
    workers, cache, db, example
):
    sql = "SELECT name FROM moon"
    start_crowd(workers, "fetch", sql, threads=5)
    assert {result["error"] for result in outcomes(workers)} == {"ProgrammingError"}
    assert not cache.exists(sql)
    db.execute("CREATE TABLE moon (name VARCHAR(30))")
    db.execute("INSERT INTO moon VALUES ('Moon')")
    start = time.monotonic()
    assert example.fetch(sql) == [{"name": "Moon"}]
    assert time.monotonic() - start < 1
    plant(cache, sql, "Moon")
    assert example.fetch(sql) == [{"name": "Planted"}]


def test_after_a_failure_a_crowd_is_one_select_again(workers, cache, db):
    sql = "SELECT name, SLEEP(0.2) AS slept FROM moon"
    start_crowd(workers, "fetch", sql, threads=5)
    outcomes(workers)
    db.execute("CREATE TABLE moon (name VARCHAR(30))")
    db.execute("INSERT INTO moon VALUES ('Moon')")
    wait_until(lambda: not cache.keys())
    before = selects(db)
    start_crowd(workers, "fetch", sql)
    assert_all_have([{"name": "Moon", "slept": 0}], outcomes(workers))
    assert selects(db) == before + 1


def test_a_crowd_that_comes_right_after_a_failure_is_one_select(workers, cache, db):
    for number in range(2):
        sql = f"SELECT name, SLEEP(0.1), {number} FROM moon"
        start_crowd(workers, "fetch", sql, threads=5)
        assert all("error" in result for result in outcomes(workers))
        db.execute("CREATE TABLE moon (name VARCHAR(30))")
        before = selects(db)
        start_crowd(workers, "fetch", sql)
        assert [result.get("answer") for result in outcomes(workers)] == [[]] * 100
        assert selects(db) == before + 1
        db.execute("DROP TABLE moon")


def test_what_fails_leaves_nothing_in_redis_for_long(example, cache):
    with pytest.raises(ValueError, match="Mercury"):
        example.planet("Mercury")
    assert not cache.keys()
    for sql in "SELECT name FROM moon", "SET @moon = 1":
        with pytest.raises((ValueError, pymysql.Error)):
            example.fetch(sql)
    assert all(0 < cache.pttl(key) <= 1000 for key in cache.scan_iter())


# ---------------------------------------------------------------- an asker who is gone


def test_a_lock_whose_owner_is_gone_is_waited_for_and_no_longer(example, cache, db):
    example.planet(2)
    with slow(db, 0):
        dead = begin(example.planet, 1)
        wait_until(lambda: cache.exists("lock:planet:1"))
        assert 0 < cache.pttl("lock:planet:1") <= 1000 * example.LOCK
    dead.result(10)
    cache.delete("planet:1")
    cache.set("lock:planet:1", "of one who was killed", px=700)
    before = selects(db)
    start = time.monotonic()
    others = [begin(example.planet, 1) for _ in range(25)]
    assert [other.result(10) for other in others] == [MERCURY] * 25
    assert 0.5 < time.monotonic() - start < 2
    assert selects(db) == before + 1


def test_nobody_waits_longer_than_the_lock_may_live(example, cache):
    example.LOCK = 0.5
    cache.set("lock:planet:1", "for ever")
    start = time.monotonic()
    assert example.planet(1) == MERCURY
    assert 0.4 < time.monotonic() - start < 3


# ---------------------------------------------------------------- the cost


def cost(sent):
    """What was sent, without the words that bracket a transaction."""
    return [word for word in sent.commands if word not in {"WATCH", "MULTI", "EXEC"}]


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
def test_a_miss_costs_seven_commands_at_most_and_a_hit_one(
    function, argument, key, example, cache, db
):
    technique = getattr(example, function)
    technique(argument)  # connects, and makes the lock's script known
    cache.flushdb()
    before = selects(db)
    with Sent(cache) as miss:
        technique(argument)
    assert selects(db) == before + 1
    assert 3 <= len(cost(miss)) <= 7, miss.commands
    assert cache.exists(key or argument)
    for _ in range(3):
        with Sent(cache) as hit:
            technique(argument)
        assert hit.commands == ["GET" if function == "fetch" else "HGETALL"]
    assert selects(db) == before + 1


def test_a_save_costs_seven_commands_at_most(example, cache, db):
    example.save_planet(1, "Mercurius")
    with Sent(cache) as save:
        example.save_planet(1, "Hermes")
    assert cost(save), "nothing was written through"
    assert len(cost(save)) <= 7, save.commands
    assert load().planet(1) == {"id": 1, "name": "Hermes"}
