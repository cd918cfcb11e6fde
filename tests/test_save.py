"""After save_planet, everybody reads what was saved."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pymysql
import pytest
from conftest import load
from servers import free_port
from tools import Relay, begin, plain, selects, wait_until

MERCURY = {"id": 1, "name": "Mercury"}
NEW = {"id": 1, "name": "New"}


def row(db, id=1):
    """What MySQL itself holds: the name, or nothing."""
    db.execute("SELECT name FROM planet WHERE id = %s", (id,))
    return db.fetchall()


@pytest.fixture
def other():
    """The sample in another process, as far as its state goes."""
    return load()


@pytest.fixture
def late(mysql_server):
    """The sample, and the relay that can make MySQL's replies to it late."""
    with Relay(mysql_server.port) as relay:
        yield load(DB_PORT=str(relay.port)), relay


def with_late_reply(late, function, *args):
    """Begin a call, and wait until MySQL has replied to it but the caller does not know."""
    module, relay = late
    take_idle = module.take_idle

    def hold(idle):
        connection = take_idle(idle)
        module.take_idle = take_idle
        relay.hold()
        return connection

    def call():
        module.fetch("SELECT 'connected'")
        module.take_idle = hold
        return function(*args)

    future = begin(call)
    assert relay.holding.wait(10)
    return future


# ---------------------------------------------------------------- everybody reads it


@pytest.mark.parametrize("name", ["New", "", "NULL", "é ☿ 水星 💫", "'; --", None])
def test_a_saved_planet_is_what_everybody_reads(name, example, other, cache, db):
    before = example.planet(1), other.planet(1)
    assert before == (MERCURY, MERCURY)
    assert example.save_planet(1, name) == {"id": 1, "name": name}
    assert row(db) == ((name,),)
    before = selects(db)
    assert example.planet(1) == other.planet(1) == {"id": 1, "name": name}
    assert selects(db) == before  # it is in the cache already
    assert 0 < cache.ttl("planet:1") <= example.TTL
    cache.delete("planet:1")
    assert other.planet(1) == {"id": 1, "name": name}


def test_a_new_planet_is_what_everybody_reads(example, other, cache, db):
    assert example.save_planet(9, "Pluto") == {"id": 9, "name": "Pluto"}
    before = selects(db)
    assert example.planet(9) == other.planet(9) == {"id": 9, "name": "Pluto"}
    assert selects(db) == before
    assert row(db, 9) == (("Pluto",),)


def test_a_planet_remembered_as_absent_is_there_once_it_is_saved(example, other, db):
    assert example.planet(9) is None
    before = selects(db)
    assert other.planet(9) is None
    assert selects(db) == before  # remembered
    assert other.save_planet(9, "Pluto") == {"id": 9, "name": "Pluto"}
    assert example.planet(9) == other.planet(9) == {"id": 9, "name": "Pluto"}


# ---------------------------------------------------------------- with a slow reader


@pytest.mark.parametrize("id", [1, 9], ids=["old record", "no record"])
def test_a_reader_who_stores_late_does_not_undo_a_save(
    id, late, example, other, cache, db
):
    new = {"id": id, "name": "New"}
    reading = with_late_reply(late, late[0].planet, id)
    saving = begin(example.save_planet, id, "New")
    wait_until(lambda: row(db, id) == (("New",),))
    late[1].release()
    assert reading.result(10) in (MERCURY, None, new)
    assert saving.result(10) == new
    for module in example, other, late[0]:
        assert module.planet(id) == new
    cache.delete(f"planet:{id}")
    assert other.planet(id) == new


@pytest.mark.parametrize("id", [1, 9], ids=["old record", "no record"])
def test_a_reader_whose_lock_has_expired_does_not_undo_a_save(
    id, late, example, other, cache, db
):
    new = {"id": id, "name": "New"}
    late[0].LOCK_TTL = example.LOCK_TTL = 0.3
    reading = with_late_reply(late, late[0].planet, id)
    assert example.save_planet(id, "New") == new
    assert not reading.done()
    before = selects(db)
    assert other.planet(id) == new
    assert selects(db) == before  # it was in the cache, and stays there
    late[1].release()
    assert reading.result(10) in (MERCURY, None, new)
    for module in example, other, late[0]:
        assert module.planet(id) == new
    assert selects(db) == before


@pytest.mark.parametrize("gone", ["expired", "deleted"])
def test_a_late_reader_stores_nothing_old_even_if_the_saved_record_is_gone(
    gone, late, example, other, cache, db
):
    late[0].LOCK_TTL = example.LOCK_TTL = 0.3
    reading = with_late_reply(late, late[0].planet, 1)
    assert example.save_planet(1, "New") == NEW
    if gone == "expired":
        cache.pexpire("planet:1", 1)
        wait_until(lambda: not cache.exists("planet:1"))
    else:
        cache.delete("planet:1")
    late[1].release()
    assert reading.result(10) in (MERCURY, NEW)
    assert other.planet(1) == NEW


def test_a_reader_whose_store_itself_is_late_does_not_undo_a_save(
    redis_server, example, other, cache, db
):
    # What it sends to Redis is held up; by then it has itself given up waiting.
    with Relay(redis_server.port) as relay:
        url = f"redis://:{redis_server.password}@127.0.0.1:{relay.port}/0"
        reader = load(REDIS_URL=url)
        reader.LOCK_TTL = example.LOCK_TTL = 0.3
        reader.planet(2)
        asked = reader.query

        def ask(*args):
            rows = asked(*args)
            relay.hold(replies=False)
            return rows

        reader.query = ask
        assert reader.planet(1) == MERCURY
        assert example.save_planet(1, "New") == NEW
        relay.release()
        wait_until(lambda: not cache.exists("lock:planet:1"))
        assert other.planet(1) == NEW
        assert reader.planet(1) == NEW


def test_readers_everywhere_see_no_older_record_after_a_save(example, cache, db):
    readers = [load() for _ in range(4)]
    for reader in readers:
        reader.POLL_EVERY = 0.005
    example.POLL_EVERY = 0.005
    saved = 0
    over = threading.Event()

    def read(reader):
        count = 0
        while not over.is_set():
            expected = saved
            found = int(reader.planet(1)["name"])
            assert found >= expected
            count += 1
        return count

    example.save_planet(1, "0")
    calls = [begin(read, reader) for reader in readers]
    try:
        for number in range(1, 201):
            if number % 2:
                cache.delete("planet:1")  # so that a reader is about to store
            example.save_planet(1, str(number))
            saved = number
    finally:
        over.set()
    assert all(call.result(10) for call in calls)  # each has read something


# ---------------------------------------------------------------- with another saver


def test_savers_at_once_leave_the_cache_equal_to_the_database(example, other, db):
    together = threading.Barrier(2)

    def save(module, name):
        together.wait(10)
        return module.save_planet(1, name)

    example.POLL_EVERY = other.POLL_EVERY = 0.005
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        for number in range(50):
            names = f"A{number}", f"B{number}"
            calls = [one.submit(save, example, names[0])]
            calls += [two.submit(save, other, names[1])]
            answers = {call.result(10)["name"] for call in calls}
            ((name,),) = row(db)
            assert name in answers <= set(names)
            before = selects(db)
            assert example.planet(1) == other.planet(1) == {"id": 1, "name": name}
            assert selects(db) == before  # so it is what the cache holds


# ---------------------------------------------------------------- MySQL fails


def test_a_save_that_mysql_refuses_changes_nothing(example, other, cache, db):
    assert other.planet(1) == MERCURY
    for id in 1, 9:
        with pytest.raises(pymysql.err.DataError):
            example.save_planet(id, "x" * 31)
    assert row(db) == (("Mercury",),) and row(db, 9) == ()
    assert other.planet(1) == MERCURY and other.planet(9) is None
    assert example.save_planet(1, "x" * 30)["name"] == "x" * 30


def test_a_save_whose_reply_is_lost_is_what_everybody_reads(late, other, cache, db):
    saver, relay = late
    assert other.planet(1) == MERCURY
    db.execute("LOCK TABLES planet WRITE")
    saving = begin(saver.save_planet, 1, "New")
    sql = (
        "SELECT 1 FROM information_schema.processlist WHERE info LIKE 'INSERT INTO pl%'"
    )
    wait_until(lambda: db.execute(sql))
    relay.hold()
    db.execute("UNLOCK TABLES")
    wait_until(lambda: row(db) == (("New",),))
    relay.cut()
    relay.release()
    with pytest.raises(pymysql.err.OperationalError):
        saving.result(10)
    assert other.planet(1) == NEW


def test_mysql_does_not_save_after_the_caller_has_given_up(example, db):
    db.execute("START TRANSACTION")
    db.execute("SELECT * FROM planet WHERE id = 1 FOR UPDATE")
    start = time.monotonic()
    with pytest.raises(pymysql.err.OperationalError, match="Lock wait timeout"):
        example.save_planet(1, "New")
    assert time.monotonic() - start < example.MYSQL_TIMEOUT
    db.execute("ROLLBACK")
    assert row(db) == (("Mercury",),)


@pytest.mark.parametrize("id", [0, -1, 2**32, "0", "-1", "1abc", "", "1.5", 1.5, None])
def test_a_save_of_an_id_that_no_planet_can_have_is_refused(id, example, cache, db):
    db.execute("SELECT id, name FROM planet")
    before = db.fetchall()
    with pytest.raises((ValueError, TypeError)):
        example.save_planet(id, "Nowhere")
    db.execute("SELECT id, name FROM planet")
    assert db.fetchall() == before
    assert not cache.keys()


# ---------------------------------------------------------------- without Redis


def test_a_save_reaches_mysql_when_redis_is_away(db):
    module = load(REDIS_URL=f"redis://127.0.0.1:{free_port()}")
    assert module.save_planet(1, "New") == NEW
    assert row(db) == (("New",),)
    assert module.planet(1) == NEW
    with pytest.raises(pymysql.err.DataError):
        module.save_planet(1, "x" * 31)


def test_a_save_reaches_mysql_when_redis_hangs(new_servers, db):
    server = new_servers.redis()
    module = load(REDIS_URL=server.url)
    module.planet(2)
    server.pause()
    call = begin(module.save_planet, 1, "New")
    assert call.result(1.5) == NEW
    assert row(db) == (("New",),)
    server.resume()


@pytest.mark.parametrize("policy", ["volatile-lru", "noeviction"])
def test_a_save_leaves_no_old_record_in_a_redis_that_is_full(
    policy, new_servers, db, caplog
):
    server = new_servers.redis("--maxmemory-policy", policy)
    module, reader = load(REDIS_URL=server.url), load(REDIS_URL=server.url)
    assert module.planet(1) == reader.planet(1) == MERCURY
    with plain(server) as cache:
        cache.config_set("maxmemory", 1)
        assert module.save_planet(1, "New") == NEW
        assert module.planet(1) == reader.planet(1) == NEW
        cache.config_set("maxmemory", 0)
        assert module.planet(1) == reader.planet(1) == NEW
    assert "maxmemory" in caplog.text
    assert "planet:1" not in caplog.text  # redis-py quotes the command that failed
