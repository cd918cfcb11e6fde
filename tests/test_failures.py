"""What a caller sees when Redis or MySQL fails, in the order of the README's table."""

import contextlib
import itertools
import os
import pickle
import socket
import statistics
import time
from concurrent.futures import wait

import pymysql
import pytest
import redis
from conftest import PROJECT, load
from servers import Servers, free_port
from tools import (
    Relay,
    Worker,
    begin,
    holders,
    is_well,
    outcomes,
    plain,
    plain_mysql,
    plant,
    selects,
    start_cluster,
    start_crowd,
    wait_until,
    warnings,
)

MERCURY = {"id": 1, "name": "Mercury"}
VENUS = {"id": 2, "name": "Venus"}
PLANTED = {"id": 1, "name": "Planted"}
NAMES = "SELECT name FROM planet WHERE id < 3 ORDER BY id"
ROWS = [{"name": "Mercury"}, {"name": "Venus"}]


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def is_right(module):
    """Call both techniques; how long the slower one took."""
    planet, first = timed(module.planet, 1)
    rows, second = timed(module.fetch, NAMES)
    assert (planet, rows) == (MERCURY, ROWS)
    return max(first, second)


def is_hit(module, cache):
    """Whether the module reads what was put into this cache."""
    module.planet(1)
    if not cache.exists("planet:1"):
        return False
    plant(cache, "planet:1")
    hit = module.planet(1) == PLANTED
    cache.delete("planet:1")
    return hit


@pytest.fixture
def own_redis(new_servers):
    """A Redis that a test may break."""
    return new_servers.redis()


@pytest.fixture
def own_cache(own_redis):
    with plain(own_redis) as client:
        yield client


# ---------------------------------------------------------------- Redis is out of reach


def test_a_redis_that_is_down_costs_almost_nothing_and_is_reported_once(caplog):
    url = f"redis://somebody:a-secret@127.0.0.1:{free_port()}"
    module = load(REDIS_URL=url)
    assert is_right(module) < 1
    times = [timed(module.planet, 1)[1] for _ in range(100)]
    times += [timed(module.fetch, NAMES)[1] for _ in range(100)]
    assert statistics.median(times) < 0.005
    assert max(times) < 0.25  # the machine may be busy with something else
    (warning,) = warnings(caplog, module, "a-secret", "somebody", url)
    assert "refused" in warning


def test_an_outage_is_reported_once_in_warn_every_seconds(
    caplog, own_redis, own_cache, db
):
    module = load(REDIS_URL=own_redis.url)
    module.REDIS_PAUSE = 0.01
    is_right(module)
    own_redis.kill()
    for _ in range(20):
        is_right(module)
        module.save_planet(2, "Venus")
        time.sleep(0.02)  # so that the pause is over
    both = warnings(caplog, module, own_redis.password)
    assert sorted(text.split(" in Redis")[0].split(",")[0] for text in both) == [
        "Redis failed",
        "a key",  # of the saves
    ]
    module.WARN_EVERY = 0.1
    time.sleep(0.1)
    is_right(module)
    assert len(warnings(caplog, module, own_redis.password)) == 3
    own_redis.start()
    wait_until(lambda: is_hit(module, own_cache))


def test_saves_do_not_prolong_the_pause(own_redis, own_cache, db):
    module = load(REDIS_URL=own_redis.url)
    module.REDIS_PAUSE = 1
    own_redis.kill()
    is_right(module)
    start = time.monotonic()
    own_redis.start()
    own_redis.kill()
    while time.monotonic() < start + 0.9:
        module.save_planet(2, "Venus")
    own_redis.start()
    wait_until(lambda: is_hit(module, own_cache), 0.9)


def test_a_wrong_password_is_reported_but_not_shown(caplog, own_redis):
    wrong = own_redis.url.replace(own_redis.password, "a-wrong-password")
    module = load(REDIS_URL=wrong)
    assert is_right(module) < 1
    assert is_right(module) < 0.2
    secrets = "a-wrong-password", own_redis.password, wrong
    (warning,) = warnings(caplog, module, *secrets)
    assert "password" in warning


def test_a_redis_that_loads_its_data_is_not_used_until_it_has(caplog, new_servers):
    # Without a password, so that PING tells whether it still loads.
    server = new_servers.redis(password="")
    module = load(REDIS_URL=server.url)
    module.REDIS_PAUSE = 0.2
    is_right(module)
    with plain(server) as cache:
        for number in range(1000):
            cache.set(f"some data {number}", "x" * 100)
        cache.save()
        server.kill()
        # It takes 1 ms for each key, and listens to clients after each KB.
        server.args += ["--key-load-delay", "1000"]
        server.args += ["--loading-process-events-interval-bytes", "1024"]
        server.launch(*server.command())
        wait_until(lambda: server.ask(b"PING\r\n").startswith(b"-LOADING"))
        slowest = 0
        while server.ask(b"PING\r\n").startswith(b"-LOADING"):
            slowest = max(slowest, is_right(module))
            time.sleep(0.05)
        assert 0 < slowest < 1
        (warning,) = warnings(caplog, module, server.url)
        assert "loading" in warning.lower()
        wait_until(lambda: is_hit(module, cache))
        assert cache.dbsize() >= 1000


@pytest.mark.parametrize("protocol", ["redis", "rediss"])
def test_a_port_that_accepts_and_never_answers_costs_one_timeout(protocol, caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        module = load(REDIS_URL=f"{protocol}://:a-secret@127.0.0.1:{port}")
        assert is_right(module) < 1
        assert is_right(module) < 0.2
        assert len(warnings(caplog, module, "a-secret")) == 1


def test_a_crowd_at_a_redis_that_hangs_waits_for_one_timeout(caplog, own_redis):
    module = load(REDIS_URL=own_redis.url)
    is_right(module)
    own_redis.pause()
    calls = [begin(is_right, module) for _ in range(25)]
    assert max(call.result(30) for call in calls) < 3  # 6 if one after the other
    own_redis.resume()
    assert len(warnings(caplog, module, own_redis.password)) == 1


@pytest.mark.parametrize("fault", ["pause", "kill"])
@pytest.mark.parametrize("moment", ["the query", "the store"])
def test_a_result_that_was_loaded_is_not_loaded_again(
    fault, moment, own_redis, db, monkeypatch
):
    module = load(REDIS_URL=own_redis.url)
    is_right(module)
    with plain(own_redis) as cache:
        cache.flushall()
    breaks = getattr(own_redis, fault)
    if moment == "the query":
        query = module.query
        module.query = lambda *args: (query(*args), breaks())[0]
    else:  # stored; the lock is still to be released
        execute = redis.client.Pipeline.execute
        stored = lambda pipe: (execute(pipe), breaks())[0]
        monkeypatch.setattr(redis.client.Pipeline, "execute", stored)
    before = selects(db)
    result, seconds = timed(module.planet, 1)
    assert (result, selects(db)) == (MERCURY, before + 1)
    assert seconds < 1.5  # five timeouts, if the store and the release find it hung
    if fault == "pause":
        own_redis.resume()


def test_a_redis_killed_and_restarted_between_calls_is_hardly_noticed(
    own_redis, own_cache
):
    module = load(REDIS_URL=own_redis.url)
    for _ in range(3):
        own_redis.kill()
        own_redis.start()
        calls = [begin(is_right, module) for _ in range(4)]
        assert max(call.result(30) for call in calls) < 1
        assert is_hit(module, own_cache)


def test_a_redis_that_starts_after_the_first_call_is_used(new_servers):
    port = free_port()
    module = load(REDIS_URL=f"redis://127.0.0.1:{port}")
    module.REDIS_PAUSE = 0.1
    is_right(module)
    with plain(new_servers.redis(port=port, password="")) as cache:
        wait_until(lambda: is_hit(module, cache))


# ---------------------------------------------------------------- Redis refuses writes


def fill(cache):
    """Fill a Redis with keys that have no TTL, until it has no room for a small one."""
    cache.config_set("maxmemory", cache.info("memory")["used_memory"] + 200_000)
    for size, count in (10_000, 1000), (1, 100_000):
        with pytest.raises(redis.OutOfMemoryError):
            for number in range(count):
                cache.set(f"full {size} {number}", "x" * size)


@pytest.mark.parametrize("policy", ["volatile-lru", "noeviction"])
def test_a_full_redis_costs_no_result_and_serves_hits(
    policy, caplog, own_redis, own_cache
):
    own_cache.config_set("maxmemory-policy", policy)
    module = load(REDIS_URL=own_redis.url)
    module.TTL = 600
    is_right(module)
    plant(own_cache, "planet:1")
    plant(own_cache, NAMES)
    if policy == "volatile-lru":  # it would make room by removing these
        own_cache.persist("planet:1"), own_cache.persist(NAMES)
    fill(own_cache)
    clients = own_cache.info("stats")["total_connections_received"]
    for _ in range(10):
        assert module.planet(1) == PLANTED
        assert module.fetch(NAMES) == [{"name": "Planted"}, {"name": "Venus"}]
        result, seconds = timed(module.planet, 2)  # a miss that cannot be stored
        assert result == VENUS and seconds < 1
        assert module.planet(99) is None
    assert own_cache.info("stats")["total_connections_received"] == clients
    (warning,) = warnings(caplog, module, own_redis.password)
    assert "maxmemory" in warning
    own_cache.config_set("maxmemory", 0)
    own_cache.flushall()
    assert is_hit(module, own_cache)  # at once: it was not paused


def test_a_read_only_redis_costs_no_result_and_serves_hits(
    caplog, own_redis, own_cache
):
    module = load(REDIS_URL=own_redis.url)
    module.TTL = 600
    is_right(module)
    plant(own_cache, "planet:1")
    own_cache.replicaof("127.0.0.1", free_port())
    for _ in range(10):
        assert module.planet(1) == PLANTED
        assert module.planet(2) == VENUS
        assert module.planet(99) is None
    (warning,) = warnings(caplog, module, own_redis.password)
    assert "read only" in warning
    own_cache.replicaof("NO", "ONE")
    own_cache.delete("planet:1")
    assert is_hit(module, own_cache)


@pytest.mark.parametrize("old_primary", ["is demoted", "is gone"])
def test_after_a_failover_the_new_primary_is_used(old_primary, new_servers):
    # The relay is the host name of a primary endpoint, which then leads elsewhere.
    old, new = new_servers.redis(password=""), new_servers.redis(password="")
    with Relay(old.port) as relay, plain(old) as demoted, plain(new) as promoted:
        module = load(REDIS_URL=f"redis://127.0.0.1:{relay.port}")
        module.REDIS_PAUSE = 0.5
        is_right(module)
        relay.target = new.port
        if old_primary == "is demoted":
            demoted.replicaof("127.0.0.1", new.port)
        else:
            old.kill()
        assert module.planet(2) == VENUS
        wait_until(lambda: is_hit(module, promoted), 2)


# ---------------------------------------------------------------- garbage under a key

TEXTS = {
    "empty": "",
    "not JSON": "Mercury",
    "deep": "[" * 100_000,
    "not UTF-8": b'[["name"],[["Mercury","\xff\xfe"]]]',
    "an object": "{}",
    "null": "null",
    "a number": "0",
    "text": '"abc"',
    "rows as the tutorial of 2019 stored them": '[{"name": "Planted"}]',
    "truncated": '[["name"],[["Mercury","Ven',
    "a column is null": '[["name"],[null]]',
    "a name is a list": '[[["name"]],[["Mercury"]]]',
}
HASHES = {
    "as the tutorial of 2019 stored it": {"id": "1", "name": "Planted"},
    "an empty field": {"id": "1", "name": ""},
    "a truncated field": {"id": "1", "name": '"Plan'},
    "a deep field": {"id": "1", "name": "[" * 100_000},
    "a field that is not UTF-8": {"id": "1", "name": b'"\xff\xfe"'},
    "a name that is not UTF-8": {"id": "1", b"\xff": "1"},
}
MARKS = {
    "unknown type": '{"eval":"exit()"}',
    "no type": "{}",
    "two types": '{"Decimal":"1","bytes":"00"}',
    "not a number": '{"Decimal":"Mercury"}',
    "number of nothing": '{"Decimal":null}',
    "not a date": '{"datetime":"2026-13-01T00:00:00"}',
    "infinite time": '{"timedelta":1e999}',
    "not hexadecimal": '{"bytes":["Mercury"]}',
}
for name, text in MARKS.items():
    TEXTS[name] = f'[["name"],[["Mercury",{text}]]]'
    HASHES[name] = {"id": "1", "name": text}

GARBAGE = {f"string: {name}": ("set", text) for name, text in TEXTS.items()}
GARBAGE.update((f"hash: {name}", ("hset", None, None, h)) for name, h in HASHES.items())
GARBAGE.update(list=("rpush", "id", "1"), set=("sadd", "id"), bits=("setbit", 7, 1))


@pytest.mark.parametrize("technique", ["fetch", "planet"])
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=list(GARBAGE))
def test_a_value_that_cannot_be_read_is_a_miss_is_replaced_and_is_reported(
    technique, garbage, example, cache, caplog
):
    key, right = {"fetch": (NAMES, ROWS), "planet": ("planet:1", MERCURY)}[technique]
    argument = NAMES if technique == "fetch" else 1
    command, *value = garbage
    getattr(cache, command)(key, *value)
    assert getattr(example, technique)(argument) == right
    assert cache.type(key) == (b"string" if technique == "fetch" else b"hash")
    assert 0 < cache.ttl(key) <= example.TTL
    plant(cache, key)
    assert getattr(example, technique)(argument) != right
    (warning,) = warnings(caplog, example)
    assert "cannot be read" in warning
    assert not any(word in warning for word in ("Mercury", "Planted", "exit", "2026"))


def test_a_mistake_in_a_decoder_is_reported(example, cache, caplog):
    example.planet(1)
    example.from_json = lambda text: text.no_such_method()
    for _ in range(3):
        assert example.planet(1) == MERCURY
    (warning,) = warnings(caplog, example)
    assert "AttributeError" in warning


class Bomb:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_no_value_in_redis_makes_the_program_run_code(example, cache, tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        cache.flushall()
        bomb = pickle.dumps(Bomb(str(tmp_path / "executed")), protocol)
        cache.set(NAMES, bomb)
        cache.hset("planet:1", mapping={"id": bomb, "name": bomb})
        assert is_right(example) < 1
    assert not list(tmp_path.iterdir())
    pickle.loads(bomb)
    assert list(tmp_path.iterdir())  # it would have


# ---------------------------------------------------------------- MySQL is out of reach


@pytest.fixture(scope="module")
def breakable_mysql():
    with Servers() as own:
        server = own.mysql()
        server.client(PROJECT / "seed.sql")
        yield server


@pytest.fixture
def own_mysql(breakable_mysql):
    """A MySQL that a test may break."""
    yield breakable_mysql
    if breakable_mysql.process.poll() is None:
        breakable_mysql.resume()
    else:
        breakable_mysql.start()
    breakable_mysql.client("UPDATE tutorial.planet SET name = 'Mercury' WHERE id = 1")


@pytest.fixture
def module(own_mysql, cache):
    """The sample, in front of the MySQL that a test may break."""
    return load(DB_PORT=str(own_mysql.port), DB_PASS=own_mysql.password)


def set_mysql_timeout(module, seconds):
    for name in "connect_timeout", "read_timeout", "write_timeout":
        assert module.MYSQL_OPTIONS[name] == module.MYSQL_TIMEOUT == 5
        module.MYSQL_OPTIONS[name] = seconds


def failed_miss(module, id):
    """Call for a planet that MySQL cannot load; the number of seconds that took."""
    start = time.monotonic()
    with pytest.raises(pymysql.err.OperationalError):
        module.planet(id)
    return time.monotonic() - start


def connection_id(module, number):
    """The number of this thread's connection; `number` makes each call a miss."""
    rows = module.fetch("SELECT CONNECTION_ID() AS id, %s AS number", (number,))
    return rows[0]["id"]


def test_a_connection_that_mysql_has_closed_is_replaced_unnoticed(example, db):
    before = connection_id(example, 1)
    assert connection_id(example, 2) == before
    db.execute("KILL %s", (before,))
    after = connection_id(example, 3)
    assert after != before
    db.execute("KILL %s", (after,))
    assert example.save_planet(9, "Pluto") == {"id": 9, "name": "Pluto"}


def test_a_mysql_that_was_restarted_is_reached_again_unnoticed(
    module, own_mysql, cache
):
    is_right(module)
    own_mysql.kill()
    own_mysql.start()
    cache.flushall()
    is_right(module)
    assert module.save_planet(1, "Mercurius")["name"] == "Mercurius"


def test_a_connection_killed_during_a_query_leaves_a_thread_that_works(example, db):
    def killed():
        with pytest.raises(pymysql.Error):
            example.fetch("SELECT SLEEP(5)")
        return is_right(example)

    call = begin(killed)
    sql = "SELECT id FROM information_schema.processlist WHERE info LIKE 'SELECT SL%'"
    wait_until(lambda: db.execute(sql))
    db.execute("KILL %s", (db.fetchone()[0],))
    assert call.result(4) < 1


def test_while_mysql_is_down_hits_are_served_and_misses_fail_at_once(
    module, own_mysql, cache, caplog
):
    is_right(module)
    own_mysql.kill()
    assert is_right(module) < 1  # in this thread, which has lost its connection,
    assert begin(is_right, module).result(30) < 1  # and in one that never had any
    for call in [begin(failed_miss, module, 2) for _ in range(20)]:
        assert call.result(30) < 3
    with pytest.raises(pymysql.err.OperationalError):
        module.fetch("SELECT 2")
    with pytest.raises(pymysql.err.OperationalError):
        module.save_planet(2, "Lost")
    assert not cache.exists("planet:2", "SELECT 2", "lock:planet:2")
    assert not warnings(caplog, module)
    own_mysql.start()
    assert module.planet(2) == VENUS
    assert cache.exists("planet:2")


@pytest.mark.parametrize("connected", [True, False])
def test_a_mysql_that_hangs_costs_one_timeout_or_two(connected, module, own_mysql):
    set_mysql_timeout(module, 0.5)
    if connected:  # the first timeout is of the connection, the second of a new one
        is_right(module)
    own_mysql.pause()
    assert 0.4 < failed_miss(module, 2) < (1.4 if connected else 0.9)
    if connected:
        assert is_right(module) < 0.4
    own_mysql.resume()
    wait_until(lambda: module.query("SELECT 1 AS one") == [{"one": 1}])
    assert module.planet(2) == VENUS


def test_callers_that_miss_while_mysql_hangs_get_its_error_within_seconds(
    module, own_mysql
):
    set_mysql_timeout(module, 0.5)
    assert module.MAX_WAIT == 12
    module.MAX_WAIT, module.MYSQL_TIMEOUT = 1, 0.5
    is_right(module)
    own_mysql.pause()
    calls = [begin(failed_miss, module, 2) for _ in range(25)]
    # At most MAX_WAIT, a turn among MAX_QUERIES, the old connection and a new one.
    assert max(call.result(30) for call in calls) < 1 + 0.5 + 0.5 + 0.5 + 0.5
    assert is_right(module) < 1
    own_mysql.resume()
    wait_until(lambda: module.planet(2) == VENUS)


def test_a_query_that_takes_too_long_is_cut_off_and_not_repeated(example, db):
    set_mysql_timeout(example, 0.5)
    limits = "max_execution_time = 5000", "max_statement_time = 5,"
    for limit in limits:
        assert limit in example.SESSION_SETTINGS
        shorter = limit.replace("5", "1")
        example.MYSQL_OPTIONS["init_command"] = example.MYSQL_OPTIONS[
            "init_command"
        ].replace(limit, shorter)
    example.planet(1)
    before = selects(db)
    start = time.monotonic()
    with pytest.raises(pymysql.err.OperationalError):
        example.fetch("SELECT SLEEP(30), id FROM planet")
    assert time.monotonic() - start < 2
    assert selects(db) == before + 1
    # MySQL ends it, too.
    sql = (
        "SELECT id FROM information_schema.processlist WHERE info LIKE 'SELECT SLEEP%'"
    )
    wait_until(lambda: not db.execute(sql), 3)
    assert example.fetch("SELECT 'of the next one' AS x") == [{"x": "of the next one"}]


def test_a_process_runs_at_most_max_queries_at_a_time(example, cache, db):
    def running():
        db.execute(
            "SELECT COUNT(*) FROM information_schema.processlist"
            " WHERE info LIKE '%%FROM planet%%' AND id <> CONNECTION_ID()"
        )
        return db.fetchone()[0]

    db.execute("LOCK TABLES planet WRITE")
    calls = [begin(example.fetch, f"SELECT {n} FROM planet") for n in range(15)]
    wait_until(lambda: running() == 10)
    time.sleep(0.3)
    assert running() == example.MAX_QUERIES == 10
    example.MYSQL_TIMEOUT = 0.2
    with pytest.raises(pymysql.err.OperationalError, match="10 queries are running"):
        example.fetch("SELECT 'one too many' FROM planet")
    db.execute("UNLOCK TABLES")
    assert [len(call.result(10)) for call in calls] == 15 * [8]


# ---------------------------------------------------------------- with the real numbers
# No time is shortened here. As these tests mostly wait, all of them run at once.


def ten_seconds(module, *ids):
    """Call for ten seconds; how many of them were lost."""
    lost, end, ids = 0, time.monotonic() + 10, itertools.cycle(ids)
    while time.monotonic() < end:
        id = next(ids)
        result, seconds = timed(module.planet, id)
        assert result["id"] == id and result["name"] != "Planted"
        if seconds > 0.1:  # less is MySQL's own time
            lost += seconds
        time.sleep(0.05)
    return lost


def hung_redis(server, module):
    """A Redis that hangs for ten seconds: what that costs; when hits are back."""
    module.planet(1)
    with plain(server) as cache:
        plant(cache, "planet:1")
        cache.expire("planet:1", 600)
    assert module.planet(1) == PLANTED
    server.pause()
    lost = ten_seconds(module, 1)
    server.resume()
    return lost, wait_until(lambda: module.planet(1) == PLANTED)


def broken_shard(fault, nodes, module):
    """A shard of a cluster that fails for ten seconds: the same."""
    own = {planet_on(node): node for node in nodes}
    for id in own:
        module.planet(id)
    broken = nodes[2]  # not the one that the client knows best
    getattr(broken, fault)()
    lost = ten_seconds(module, *own)
    broken.start() if fault == "kill" else broken.resume()
    wait_until(lambda: all(map(is_well, nodes)))
    for node in nodes:
        with plain(node) as cache:
            cache.flushall()
    return lost, wait_until(
        lambda: all(module.planet(id) and holders(nodes, f"planet:{id}") for id in own)
    )


def planet_on(node):
    """The id of a planet whose key belongs on this node of a cluster."""
    with plain(node) as client:
        for id in range(1, 9):
            with contextlib.suppress(redis.ResponseError):  # MOVED
                client.exists(f"planet:{id}")
                return id
    raise AssertionError("no planet belongs there")


def killed_loader(mysql, loader, others):
    """A process that is killed while it loads: the SELECTs, and the crowd's results."""
    with plain_mysql(mysql) as connection:
        db = connection.cursor()
        db.execute("LOCK TABLES planet WRITE")
        before = selects(db)
        loader.ask("planet", 1)
        wait_until(lambda: selects(db) == before + 1)
        start_crowd(others, "planet", 1)
        time.sleep(1)
        loader.process.kill()
        db.execute("UNLOCK TABLES")
        return outcomes(others), selects(db) - before


@pytest.fixture(scope="module")
def at_once():
    """Start all of it; each test waits for its own."""
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(Servers())
        hung, theirs = own.redis(), own.redis()
        shards = [begin(start_cluster, own) for _ in range(2)]
        locked = own.mysql()
        locked.client(PROJECT / "seed.sql")
        environment = own.environment(theirs, locked)
        loader, *others = [stack.enter_context(Worker(environment)) for _ in range(3)]
        shards = [cluster.result() for cluster in shards]
        killed, paused = [load(REDIS_URL=nodes[0].url) for nodes in shards]
        futures = {
            "shard killed": begin(broken_shard, "kill", shards[0], killed),
            "shard hung": begin(broken_shard, "pause", shards[1], paused),
            "redis hung": begin(hung_redis, hung, load(REDIS_URL=hung.url)),
            "loader killed": begin(killed_loader, locked, loader, others),
        }
        yield futures
        wait(futures.values())  # of those that no test has waited for
        for client in killed, paused:
            client.redis_client().close()  # redis-py leaves that to the garbage collector


@pytest.mark.parametrize("fault", ["redis hung", "shard killed", "shard hung"])
def test_ten_seconds_of_calls_lose_less_than_one_to_a_redis_that_hangs(fault, at_once):
    lost, back = at_once[fault].result(30)
    assert lost < 1
    assert back < 6


def test_if_the_process_that_loads_is_killed_another_one_loads(at_once):
    results, queries = at_once["loader killed"].result(30)
    assert [result.get("answer") for result in results] == [MERCURY] * 50
    assert 4 < max(result["seconds"] for result in results) < 8
    assert queries == 2  # by the one that was killed, and by one of fifty
