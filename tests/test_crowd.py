"""Many callers miss the same key: how many queries and commands reach the servers."""

import contextlib
import time

import pytest
import redis
from conftest import servers
from tools import (
    MERCURY,
    Sent,
    Worker,
    begin,
    is_paused,
    outcomes,
    selects,
    start_crowd,
)

SLOW = "SELECT 'slow' AS speed, SLEEP(0.2) AS slept"
NONE = "SELECT name FROM planet WHERE id = 99"


@pytest.fixture(scope="module")
def workers(redis_server, mysql_server):
    """Four processes. A crowd is 25 threads in each."""
    environment = servers.environment(redis_server, mysql_server)
    with contextlib.ExitStack() as stack:
        four = [stack.enter_context(Worker(environment)) for _ in range(4)]
        for worker in four:
            worker.answer("planet", 1)  # by then it has imported the module
        yield four


each_kind_of_result = pytest.mark.parametrize(
    ("function", "argument", "key", "expected"),
    [
        ("fetch", SLOW, SLOW, [{"speed": "slow", "slept": 0}]),
        ("fetch", NONE, NONE, []),
        ("planet", 1, "planet:1", MERCURY),
        ("planet", 99, "planet:99", None),
    ],
    ids=["rows", "no rows", "planet", "absent planet"],
)


@each_kind_of_result
def test_a_crowd_at_a_cold_query_is_one_select(
    function, argument, key, expected, workers, cache, db
):
    before = selects(db)
    db.execute("LOCK TABLES planet WRITE")  # so that a query for planets is slow, too
    start_crowd(workers, function, argument)
    time.sleep(0.2)
    db.execute("UNLOCK TABLES")
    first = outcomes(workers)
    start_crowd(workers, function, argument)
    for results in first, outcomes(workers):
        assert [result.get("answer", "error") for result in results] == [expected] * 100
        assert max(result["seconds"] for result in results) < 1
    assert selects(db) == before + 1
    assert 0 < cache.ttl(key) <= 10
    assert cache.keys() == [key.encode()]  # the lock is gone


def test_if_the_caller_that_loads_fails_the_next_one_tries(workers, cache, db):
    # MySQL sleeps for the one row, and only then finds the number too large.
    sql = "SELECT SLEEP(0.3), EXP(1000 * id) FROM planet WHERE name = 'Mercury'"
    before = selects(db)
    start_crowd(workers[:2], "fetch", sql, threads=2)
    results = outcomes(workers[:2])
    assert all("error" in result for result in results)
    assert selects(db) == before + 4
    assert 1.1 < max(result["seconds"] for result in results) < 3  # one after the other
    assert not cache.keys()


def test_a_waiting_caller_takes_the_result_while_another_has_the_lock(example, cache):
    cache.set("lock:{planet:1}", "of another process", ex=5)
    call = begin(example.planet, 1)
    time.sleep(0.1)
    cache.hset("planet:1", mapping={"id": "1", "name": '"Planted"'})
    assert call.result(1) == {"id": 1, "name": "Planted"}


def test_waiting_callers_that_find_a_value_they_cannot_read_make_one_query(
    example, cache, db
):
    cache.set("lock:{planet:1}", "of another process", px=500)
    calls = [begin(example.planet, 1) for _ in range(20)]
    time.sleep(0.1)
    before = selects(db)
    cache.hset("planet:1", "name", "no JSON")
    assert [call.result(3) for call in calls] == 20 * [MERCURY]
    assert selects(db) == before + 1


def test_a_caller_that_gets_the_lock_looks_again(example, cache):
    look_up, planted = example.look_up, {"id": "1", "name": '"Planted"'}
    example.look_up = lambda *args: (
        look_up(*args),
        cache.hset("planet:1", mapping=planted),
    )[0]
    assert example.planet(1) == {"id": 1, "name": "Planted"}
    assert cache.keys() == [b"planet:1"]  # the lock is gone


def test_a_waiting_caller_does_not_wait_for_a_redis_that_has_failed(example, cache):
    cache.set("lock:{planet:1}", "of another process", ex=5)
    call = begin(example.planet, 1)
    time.sleep(0.1)
    example.paused_until = time.monotonic() + 5
    assert call.result(1) == MERCURY


def test_a_caller_whose_second_look_fails_releases_the_lock(example, cache):
    look_up = example.look_up

    def first(*args):
        example.look_up = second
        return look_up(*args)

    def second(*args):
        raise redis.TimeoutError

    example.look_up = first
    assert example.planet(1) == MERCURY
    assert is_paused(example)
    assert not cache.exists("lock:{planet:1}")


def test_after_max_wait_a_caller_loads_without_the_lock(example, cache):
    example.MAX_WAIT = 0.5
    cache.set("lock:{planet:1}", "of another process", px=3000)
    start = time.monotonic()
    with Sent(cache) as waiting:
        assert example.planet(1) == MERCURY
    assert 0.4 < time.monotonic() - start < 2
    assert 2 <= waiting.commands.count("HGETALL") < 15  # it sleeps between two looks
    assert cache.keys() == [b"lock:{planet:1}"]


@each_kind_of_result
def test_a_miss_costs_eight_commands_at_most_and_a_hit_one(
    function, argument, key, expected, example, cache
):
    technique = getattr(example, function)
    technique(argument)  # connects, and makes the lock's script known
    cache.flushdb()
    with Sent(cache) as miss:
        assert technique(argument) == expected
    sent = [word for word in miss.commands if word not in {"MULTI", "EXEC"}]
    assert 3 <= len(sent) <= 8, sent
    for _ in range(3):
        with Sent(cache) as hit:
            technique(argument)
        assert hit.commands == ["GET" if function == "fetch" else "HGETALL"]
