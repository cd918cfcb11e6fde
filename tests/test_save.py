"""After save_planet has returned, every planet(id) returns the saved record."""

import threading
from contextlib import contextmanager

import pymysql
import pytest
from conftest import load
from servers import free_port
from tools import MERCURY, Relay, begin, is_paused, plain, selects, wait_until

NEW = {"id": 1, "name": "New"}


def row(db, id=1):
    """What MySQL itself holds: the name, or nothing."""
    db.execute("SELECT name FROM planet WHERE id = %s", (id,))
    return db.fetchall()


@pytest.mark.parametrize("name", ["New", "", "NULL", "é ☿ 水星 💫", "'; --", None])
@pytest.mark.parametrize("id", [1, 9], ids=["old record", "no record"])
def test_every_process_reads_what_was_saved(id, name, cache, db):
    example, other = load(), load()
    old, new = MERCURY if id == 1 else None, {"id": id, "name": name}
    assert example.planet(id) == other.planet(id) == old
    assert example.save_planet(id, name) == new
    before = selects(db)
    assert example.planet(id) == other.planet(id) == new
    assert selects(db) == before  # the save has stored it in Redis
    cache.delete(f"planet:{id}")
    assert other.planet(id) == new  # from MySQL


def begin_slow(reader, id):
    """Begin planet(id). It has loaded its record, and goes on after go_on.set()."""
    query, has_loaded, go_on = reader.query, threading.Event(), threading.Event()

    def slow_query(*args):
        rows = query(*args)
        has_loaded.set()
        assert go_on.wait(10)
        return rows

    reader.query = slow_query
    reading = begin(reader.planet, id)
    assert has_loaded.wait(10)
    reader.query = query
    return reading, go_on


@pytest.mark.parametrize("id", [1, 9], ids=["old record", "no record"])
@pytest.mark.parametrize("moment", ["during the save", "after it"])
def test_a_reader_who_stores_late_does_not_undo_a_save(moment, id, cache, db):
    reader, saver, other, new = load(), load(), load(), {"id": id, "name": "New"}
    reading, go_on = begin_slow(reader, id)
    saving = begin(saver.save_planet, id, "New")
    wait_until(lambda: row(db, id) == (("New",),))
    if moment == "after it":
        assert saving.result(2) == new  # it does not wait for the reader
        cache.delete(f"planet:{id}")  # so that nothing newer is in the reader's way
    go_on.set()
    assert reading.result(10) in (MERCURY, None, new)
    assert saving.result(2) == new
    assert not reader.warned_at  # a store that is refused is no failure of Redis
    assert reader.planet(id) == saver.planet(id) == other.planet(id) == new


def test_a_slow_reader_does_not_undo_an_invalidate(example, db):
    reading, go_on = begin_slow(load(), 1)
    db.execute("UPDATE planet SET name = 'New' WHERE id = 1")
    example.invalidate("planet:1")
    go_on.set()
    assert reading.result(10) == MERCURY
    assert example.planet(1) == NEW


def test_a_reader_does_not_undo_an_invalidate_at_the_last_moment(example, cache):
    to_json = example.to_json
    example.to_json = lambda value: (example.invalidate("planet:1"), to_json(value))[1]
    assert example.planet(1) == MERCURY
    assert not cache.keys() and not example.warned_at


def test_a_slow_reader_does_not_undo_an_invalidate_in_a_full_redis(new_servers, db):
    server = new_servers.redis("--maxmemory-policy", "noeviction")
    module = load(REDIS_URL=server.url)
    reading, go_on = begin_slow(load(REDIS_URL=server.url), 1)
    with plain(server) as cache:
        cache.config_set("maxmemory", 1)
        db.execute("UPDATE planet SET name = 'New' WHERE id = 1")
        module.invalidate("planet:1")
        cache.config_set("maxmemory", 0)
    go_on.set()
    assert reading.result(10) == MERCURY
    assert module.planet(1) == NEW


def test_saves_and_reads_at_once_leave_the_cache_equal_to_the_database(cache, db):
    modules, together = [load() for _ in range(4)], threading.Barrier(4)

    def save_or_read(module, name):
        module.POLL_EVERY = 0.005
        together.wait(10)
        return (module.save_planet(1, name) if name else module.planet(1))["name"]

    last = "Mercury"
    for number in range(100):
        cache.delete("planet:1")  # so that the readers are about to store
        saved = {f"A{number}", f"B{number}"}
        names = [*saved, None, None]
        futures = [begin(save_or_read, *pair) for pair in zip(modules, names)]
        assert {future.result(10) for future in futures} <= {last, *saved}
        ((last,),) = row(db)
        before = selects(db)
        assert {module.planet(1)["name"] for module in modules} == {last}
        assert selects(db) == before  # so it is what the cache holds


# ---- MySQL or Redis fails


def test_a_save_that_mysql_refuses_changes_nothing(example, db):
    for id in 1, 9:
        before = row(db, id), example.planet(id)
        with pytest.raises(pymysql.err.DataError):
            example.save_planet(id, "x" * 31)
        assert (row(db, id), example.planet(id)) == before


def test_every_process_reads_a_save_whose_reply_was_lost(
    mysql_server, example, db, monkeypatch
):
    assert example.planet(1) == MERCURY
    with Relay(mysql_server.port) as relay:
        module = load(DB_PORT=str(relay.port))
        commit = pymysql.Connection.commit
        hold = lambda connection: (relay.hold(), commit(connection))
        monkeypatch.setattr(pymysql.Connection, "commit", hold)  # hold its reply
        saving = begin(module.save_planet, 1, "New")
        wait_until(lambda: row(db) == (("New",),))
        relay.cut()
        with pytest.raises(pymysql.err.OperationalError):
            saving.result(10)
    assert example.planet(1) == NEW


@pytest.mark.parametrize(
    "lock", ["SELECT * FROM planet FOR UPDATE", "LOCK TABLES planet WRITE"]
)
def test_mysql_does_not_save_after_the_caller_has_given_up(lock, example, db):
    db.execute("START TRANSACTION")
    db.execute(lock)
    with pytest.raises(pymysql.err.OperationalError, match="Lock wait timeout"):
        example.save_planet(1, "New")
    db.execute("ROLLBACK")
    db.execute("UNLOCK TABLES")
    assert row(db) == (("Mercury",),)


@pytest.mark.parametrize("id", [0, -1, 2**32, "0"])
def test_a_save_of_an_id_that_no_planet_can_have_is_refused(id):
    with pytest.raises(ValueError, match="not the id"):
        load(DB_PORT="1").save_planet(id, "Nowhere")  # without a query


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_a_save_reaches_mysql_when_redis_is_away(fault, new_servers, db, caplog):
    server = new_servers.redis()
    module = load(REDIS_URL=server.url)
    module.planet(2)
    getattr(server, fault)()
    assert begin(module.save_planet, 1, "New").result(1.5) == NEW
    assert module.planet(1) == NEW
    assert "a command to Redis failed" in caplog.text
    with pytest.raises(pymysql.err.DataError):
        module.save_planet(1, "x" * 31)


@pytest.fixture
def cut_off(new_servers):
    """A Redis, the sample, and a context manager in which the sample cannot reach it."""
    server = new_servers.redis()
    with Relay(server.port) as relay:

        @contextmanager
        def cut():
            relay.target = free_port()
            relay.cut()
            try:
                yield
            finally:
                relay.target = server.port

        url = server.url.replace(str(server.port), str(relay.port))
        yield server, load(REDIS_URL=url), cut


def test_a_record_that_a_save_could_not_remove_is_removed_later(cut_off, db):
    server, module, cut = cut_off
    other = load(REDIS_URL=server.url)
    assert module.planet(1) == MERCURY
    with cut():
        assert module.save_planet(1, "New") == NEW
        module.paused_until = 0
        assert module.planet(1) == NEW  # the second removal has failed too
    assert other.planet(1) == MERCURY  # from Redis
    module.paused_until = 0
    with plain(server) as cache:
        cache.set("lock:{planet:1}", "of a slow reader", ex=3)
        assert begin(module.planet, 1).result(1) == NEW
        assert not cache.exists("lock:{planet:1}")
        assert other.planet(1) == NEW
    assert not module.failed_deletes  # so it is removed once


def test_no_caller_finds_the_old_record_while_its_removal_is_repeated(cut_off, db):
    _, module, cut = cut_off
    assert module.planet(1) == MERCURY
    with cut():
        assert module.save_planet(1, "New") == NEW
    module.paused_until = 0
    client = module.redis_client()
    delete = client.delete

    def delete_while_another_caller_looks(*keys):
        client.delete = delete
        assert begin(module.planet, 1).result(1) == NEW
        return delete(*keys)

    client.delete = delete_while_another_caller_looks
    assert module.planet(1) == NEW


def test_a_removal_that_fails_again_while_it_is_repeated_is_kept(cut_off):
    _, module, cut = cut_off

    def fail():
        with cut():
            module.invalidate("planet:1")

    def delete_and_fail(*keys):
        deleted = delete(*keys)
        fail()
        return deleted

    fail()
    assert is_paused(module) and module.warned_at
    client = module.redis_client()
    delete, client.delete = client.delete, delete_and_fail
    module.paused_until = 0
    assert not module.redis_can_be_used("planet:1")
    client.delete = delete
    module.paused_until = 0
    assert module.redis_can_be_used("planet:1")


def test_a_slow_reader_does_not_undo_a_save_that_could_not_reach_redis(cut_off, db):
    server, module, cut = cut_off
    query = module.query

    def slow_query(*args):
        rows = query(*args)
        module.query = query
        with cut():
            assert module.save_planet(1, "New") == NEW
        module.paused_until = 0
        return rows

    module.query = slow_query
    assert module.planet(1) == MERCURY
    assert module.planet(1) == load(REDIS_URL=server.url).planet(1) == NEW


def test_a_read_only_redis_does_not_return_what_this_process_has_saved(new_servers, db):
    server = new_servers.redis()
    module, other = load(REDIS_URL=server.url), load(REDIS_URL=server.url)
    assert module.planet(1) == MERCURY and module.planet(2)["name"] == "Venus"
    with plain(server) as cache:
        cache.replicaof("127.0.0.1", 1)
        assert module.save_planet(1, "New") == NEW
        db.execute("UPDATE planet SET name = 'Newer' WHERE id <= 2")
        assert module.planet(1) == {"id": 1, "name": "Newer"}
        assert module.planet(2)["name"] == "Venus"  # still a hit
        cache.replicaof("NO", "ONE")
    assert module.planet(1) == other.planet(1) == {"id": 1, "name": "Newer"}


def test_a_save_leaves_no_old_record_in_a_redis_that_is_full(new_servers, db, caplog):
    server = new_servers.redis("--maxmemory-policy", "noeviction")
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
