"""The cache may fail and MySQL may go away: what the caller sees of it."""

import contextlib
import itertools
import json
import os
import pickle
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import wait

import pymysql
import pytest
import redis
from conftest import PROJECT, load, servers
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
PLANTED = {"id": 1, "name": "Planted"}
NAMES = "SELECT name FROM planet WHERE id < 3 ORDER BY id"
ROWS = [{"name": "Mercury"}, {"name": "Venus"}]


def timed(function, *args):
    start = time.perf_counter()
    answer = function(*args)
    return answer, time.perf_counter() - start


def is_right(module):
    """Ask with both techniques; how long the slower one took."""
    planet, first = timed(module.planet, 1)
    rows, second = timed(module.fetch, NAMES)
    assert (planet, rows) == (MERCURY, ROWS)
    return max(first, second)


def is_hit(module, cache):
    """Whether the module reads from this cache what was put there."""
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


def test_a_redis_that_refuses_costs_next_to_nothing_and_is_reported_once(caplog):
    secret = "a-secret"
    url = f"redis://somebody:{secret}@127.0.0.1:{free_port()}"
    module = load(REDIS_URL=url)
    assert is_right(module) < 1
    times = [timed(module.planet, 1)[1] for _ in range(100)]
    times += [timed(module.fetch, NAMES)[1] for _ in range(100)]
    assert statistics.median(times) < 0.005
    assert max(times) < 0.25  # the machine may be busy with something else
    (warning,) = warnings(caplog, module, secret, "somebody", url)
    assert "refused" in warning


def test_one_outage_is_one_warning_however_long_it_lasts_and_the_next_is_another(
    caplog, own_redis, own_cache
):
    module = load(REDIS_URL=own_redis.url)
    module.REST = 0.01
    is_right(module)
    for outage in 1, 2:
        own_redis.kill()
        for _ in range(20):
            is_right(module)
            time.sleep(0.02)  # so that each finds the rest over
        assert len(warnings(caplog, module, own_redis.password)) == outage
        own_redis.start()
        wait_until(lambda: is_hit(module, own_cache))
    assert len(warnings(caplog, module, own_redis.password)) == 2


def test_an_outage_after_nothing_but_hits_is_reported_too(caplog, own_redis, own_cache):
    module = load(REDIS_URL=own_redis.url)
    module.REST = 0.01
    module.TTL = 600
    is_right(module)
    for outage in 1, 2:
        own_redis.pause()
        is_right(module)
        assert len(warnings(caplog, module)) == outage
        own_redis.resume()
        time.sleep(0.02)
        wait_until(lambda: own_cache.ping())
        plant(own_cache, "planet:1")
        wait_until(lambda: module.planet(1) == PLANTED)
        plant(own_cache, "planet:1", "Planted", "Mercury")


def test_a_crowd_at_a_hung_redis_is_one_warning_and_waits_but_once(caplog, own_redis):
    module = load(REDIS_URL=own_redis.url)
    is_right(module)
    own_redis.pause()
    calls = [begin(is_right, module) for _ in range(25)]
    assert max(call.result(30) for call in calls) < 3  # 6 if one after the other
    own_redis.resume()
    assert len(warnings(caplog, module, own_redis.password)) == 1


@pytest.mark.parametrize("protocol", ["redis", "rediss"])
def test_a_port_that_accepts_and_never_answers_costs_one_timeout(protocol, caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        module = load(REDIS_URL=f"{protocol}://:a-secret@127.0.0.1:{port}")
        assert is_right(module) < 1
        assert is_right(module) < 0.2
        assert len(warnings(caplog, module, "a-secret")) == 1


@pytest.mark.parametrize("fault", ["pause", "kill"])
def test_a_redis_that_fails_while_mysql_is_asked_costs_one_timeout(
    fault, caplog, own_redis, db
):
    module = load(REDIS_URL=own_redis.url)
    is_right(module)
    with plain(own_redis) as cache:
        cache.flushall()
    db.execute("LOCK TABLES planet WRITE")
    before = selects(db)
    call = begin(module.planet, 1)
    wait_until(lambda: selects(db) > before)
    getattr(own_redis, fault)()
    start = time.monotonic()
    db.execute("UNLOCK TABLES")
    assert call.result(30) == MERCURY
    assert time.monotonic() - start < 1
    assert selects(db) == before + 1  # its answer was good, and is not asked for again
    if fault == "pause":
        own_redis.resume()
    assert len(warnings(caplog, module, own_redis.password)) == 1


def test_a_redis_killed_and_restarted_between_calls_is_hardly_noticed(
    own_redis, own_cache
):
    module = load(REDIS_URL=own_redis.url)
    for _ in range(5):
        own_redis.kill()
        own_redis.start()
        calls = [begin(is_right, module) for _ in range(4)]
        assert max(call.result(30) for call in calls) < 1
        assert is_hit(module, own_cache)


def test_a_redis_that_was_away_at_the_first_call_is_used_once_it_is_there(new_servers):
    port = free_port()
    module = load(REDIS_URL=f"redis://127.0.0.1:{port}")
    module.REST = 0.1
    is_right(module)
    with plain(new_servers.redis(port=port, password="")) as cache:
        wait_until(lambda: is_hit(module, cache))


def test_a_wrong_password_is_reported_but_not_shown(caplog, own_redis):
    wrong = own_redis.url.replace(own_redis.password, "a-wrong-password")
    module = load(REDIS_URL=wrong)
    assert is_right(module) < 1
    assert is_right(module) < 0.2
    secrets = "a-wrong-password", own_redis.password, wrong
    (warning,) = warnings(caplog, module, *secrets)
    assert "password" in warning


def test_a_redis_that_loads_its_data_is_left_alone_until_it_has(caplog, new_servers):
    # Without a password, so that PING tells whether it still loads.
    server = new_servers.redis(password="")
    module = load(REDIS_URL=server.url)
    module.REST = 0.2
    is_right(module)
    with plain(server) as cache:
        for number in range(1000):
            cache.set(f"some data {number}", "x" * 100)
        cache.save()
        server.kill()
        # 1 ms for a key, and an ear for clients after each KB of them.
        slow = ["--key-load-delay", "1000"]
        slow += ["--loading-process-events-interval-bytes", "1024"]
        server.args += slow
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


# ---------------------------------------------------------------- Redis refuses writes


def fill(cache):
    """Fill a Redis with keys that have no TTL, until it can take no more."""
    cache.config_set("maxmemory", cache.info("memory")["used_memory"] + 200_000)
    with pytest.raises(Exception, match="maxmemory"):
        for number in range(10_000):
            cache.set(f"full {number}", "x" * 10_000)
    # The room that is left for a small one.
    with pytest.raises(Exception, match="maxmemory"):
        for number in range(100_000):
            cache.set(f"fuller {number}", "x")


@pytest.mark.parametrize("policy", ["volatile-lru", "noeviction"])
def test_a_full_redis_costs_no_answer(policy, caplog, own_redis, own_cache):
    own_cache.config_set("maxmemory-policy", policy)
    module = load(REDIS_URL=own_redis.url)
    is_right(module)
    fill(own_cache)
    for _ in range(10):
        assert is_right(module) < 1
        assert module.planet(2) == {"id": 2, "name": "Venus"}
        assert module.planet(99) is None
    (warning,) = warnings(caplog, module, own_redis.password)
    assert "maxmemory" in warning
    own_cache.config_set("maxmemory", 0)
    own_cache.flushall()
    assert is_hit(module, own_cache)  # at once: a Redis that answers needs no rest
    own_cache.config_set("maxmemory", 1)
    assert is_right(module) < 1
    assert len(warnings(caplog, module, own_redis.password)) == 2


def test_a_full_redis_still_serves_hits(own_redis, own_cache):
    own_cache.config_set("maxmemory-policy", "noeviction")
    module = load(REDIS_URL=own_redis.url)
    module.TTL = 600
    is_right(module)
    plant(own_cache, "planet:1")
    plant(own_cache, NAMES)
    fill(own_cache)
    for _ in range(3):
        assert module.planet(1) == PLANTED
        assert module.fetch(NAMES) == [{"name": "Planted"}, {"name": "Venus"}]
        assert module.planet(2) == {"id": 2, "name": "Venus"}  # a miss, and refused


def test_a_demoted_primary_serves_hits_and_no_wrong_answer(
    caplog, own_redis, own_cache
):
    module = load(REDIS_URL=own_redis.url)
    module.TTL = 600
    is_right(module)
    plant(own_cache, "planet:1")
    own_cache.replicaof("127.0.0.1", free_port())
    for _ in range(10):
        assert module.planet(1) == PLANTED
        assert module.planet(2) == {"id": 2, "name": "Venus"}
        assert module.planet(99) is None
    (warning,) = warnings(caplog, module, own_redis.password)
    assert "read only" in warning
    own_cache.replicaof("NO", "ONE")
    own_cache.delete("planet:1")
    wait_until(lambda: is_hit(module, own_cache), 6)


def test_after_a_failover_the_new_primary_is_used(new_servers):
    # The relay is the name of a primary endpoint, which leads elsewhere now.
    old, new = new_servers.redis(password=""), new_servers.redis(password="")
    with Relay(old.port) as relay, plain(old) as demoted, plain(new) as promoted:
        module = load(REDIS_URL=f"redis://127.0.0.1:{relay.port}")
        is_right(module)
        demoted.replicaof("127.0.0.1", new.port)
        relay.target = new.port
        assert module.planet(2) == {"id": 2, "name": "Venus"}
        wait_until(lambda: is_hit(module, promoted), 6)


# ---------------------------------------------------------------- others write the keys


class Bomb:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


TEXTS = {
    "empty": "",
    "not JSON": "Mercury",
    "JSON and more": '"Mercury" "Venus"',
    "deep": "[" * 100_000,
    "deep objects": '{"rows":' * 100_000,
    "not UTF-8": b'[2,["name"],[["Mercury","\xff\xfe"]]]',
    "NUL": b"\0",
    "an object": "{}",
    "a list": "[]",
    "null": "null",
    "zero": "0",
    "true": "true",
    "text": '"ab"',
    "text of three": '"abc"',
    "two numbers": "[1,2]",
    "three numbers": "[1,2,3]",
    "zeros": "[0,0,0]",
    "three texts": '["a","b","c"]',
    "lists": "[[1],[2]]",
    "three lists": "[[1],[2],[3]]",
    "objects": '[{"id":1},{"id":2},{"id":3}]',
    "rows as the tutorial wrote them": '[{"name": "Planted"}]',
    "three such rows": '[{"name": "A"}, {"name": "B"}, {"name": "C"}]',
    "another program's rows": '{"columns":["name"],"rows":[["Planted"]]}',
    "rows without columns": '{"rows":[]}',
    "columns without rows": '{"columns":["name"]}',
    "rows are a number": '{"columns":[],"rows":5}',
    "a row too short": '{"columns":["id","name"],"rows":[[1,"Mercury"],[2]]}',
    "a row too long": '{"columns":["name"],"rows":[["Mercury"],["Venus",2]]}',
    # The shape that this program gives them: number of rows, names, columns.
    "truncated": '[2,["name"],[["Mercury","Ven',
    "too few rows": '[2,["name"],[["Mercury"]]]',
    "too many rows": '[1,["name"],[["Mercury","Venus"]]]',
    "too few columns": '[1,["id","name"],[[1]]]',
    "too many columns": '[1,["name"],[["Mercury"],[1]]]',
    "uneven columns": '[2,["id","name"],[[1,2],["Mercury"]]]',
    "a column is null": '[1,["name"],[null]]',
    "a name is a list": '[1,[["name"]],[["Mercury"]]]',
}
MARKS = {
    "unknown mark": '{"eval":"exit()"}',
    "empty mark": "{}",
    "double mark": '{"Decimal":"1","bytes":"00"}',
    "not a number": '{"Decimal":"Mercury"}',
    "number of nothing": '{"Decimal":null}',
    "not a date": '{"date":"Mercury"}',
    "date of a number": '{"date":5}',
    "not a date and time": '{"datetime":"2026-13-01T00:00:00"}',
    "infinite time": '{"timedelta":1e999}',
    "time of text": '{"timedelta":"1"}',
    "not hexadecimal": '{"bytes":"Mercury"}',
    "bytes of a number": '{"bytes":5}',
}
HASHES = {
    "no fields of ours": {"a": "b"},
    "a field too few": {"id": "1"},
    "the other field": {"name": '"Planted"'},
    "as the tutorial wrote it": {"id": "1", "name": "Planted"},
    "an id that is text": {"id": "one", "name": '"Planted"'},
    "an empty field": {"id": "1", "name": ""},
    "a truncated field": {"id": "1", "name": '"Plan'},
    "a deep field": {"id": "1", "name": "[" * 100_000},
    "a field that is not UTF-8": {"id": "1", "name": b'"\xff\xfe"'},
    "a name that is not UTF-8": {"id": "1", b"\xff": "1"},
    "a field that is a list": {"id": "1", "name": '["eval","exit()"]'},
    "neither there nor absent": {"absent": "true", "id": "1"},
    "not quite absent": {"absent": "false"},
}
for name, text in MARKS.items():
    TEXTS[name] = f'[2,["name"],[["Mercury",{text}]]]'
    HASHES[name] = {"id": "1", "name": text}


def put_string(text):
    return lambda cache, key: cache.set(key, text)


def put_hash(fields):
    return lambda cache, key: cache.hset(key, mapping=fields)


GARBAGE = {f"string: {name}": put_string(text) for name, text in TEXTS.items()}
GARBAGE.update((f"hash: {name}", put_hash(fields)) for name, fields in HASHES.items())
GARBAGE.update(
    {
        "list": lambda cache, key: cache.rpush(key, "id", "1", "name", '"Planted"'),
        "set": lambda cache, key: cache.sadd(key, "id", "1", "name", '"Planted"'),
        "sorted set": lambda cache, key: cache.zadd(key, {"id": 1, "name": 2}),
        "stream": lambda cache, key: cache.xadd(key, {"id": "1", "name": '"Planted"'}),
        "bits": lambda cache, key: cache.setbit(key, 7, 1),
        "hyperloglog": lambda cache, key: cache.pfadd(key, "Planted"),
    }
)


@pytest.mark.parametrize("technique", ["fetch", "planet"])
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=list(GARBAGE))
def test_what_another_program_wrote_is_a_miss_and_is_replaced(
    technique, garbage, example, cache, caplog
):
    key, right = {"fetch": (NAMES, ROWS), "planet": ("planet:1", MERCURY)}[technique]
    argument = NAMES if technique == "fetch" else 1
    garbage(cache, key)
    assert getattr(example, technique)(argument) == right
    assert cache.type(key) == (b"string" if technique == "fetch" else b"hash")
    assert 0 < cache.ttl(key) <= example.TTL
    plant(cache, key)
    assert getattr(example, technique)(argument) != right
    assert not warnings(caplog, example)  # the cache works


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_stored_in_redis_makes_the_program_run_code(
    protocol, example, cache, tmp_path
):
    bomb = pickle.dumps(Bomb(str(tmp_path / "executed")), protocol)
    cache.set(NAMES, bomb)
    cache.hset("planet:1", mapping={"id": bomb, "name": bomb})
    cache.set("planet:2", bomb)
    assert is_right(example) < 1
    assert example.planet(2) == {"id": 2, "name": "Venus"}
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
    address = {"DB_PORT": str(own_mysql.port), "DB_PASS": own_mysql.password}
    return load(**address)


def hurry(module, seconds):
    """Have the module wait for MySQL this long only."""
    module.DB_TIMEOUT = seconds
    for name in "connect_timeout", "read_timeout", "write_timeout":
        assert name in module.DATABASE
        module.DATABASE[name] = seconds


def miss(module, id):
    """Ask for a planet in vain; the number of seconds that took."""
    start = time.monotonic()
    with pytest.raises(pymysql.err.OperationalError):
        module.planet(id)
    return time.monotonic() - start


def test_while_mysql_is_down_hits_are_served_and_misses_fail_at_once(
    module, own_mysql, cache, caplog
):
    is_right(module)
    own_mysql.kill()
    assert is_right(module) < 1  # in this thread, which has lost its connection,
    assert begin(is_right, module).result(30) < 1  # and in one that never had any
    for call in [begin(miss, module, 2) for _ in range(20)]:
        assert call.result(30) < 2
    with pytest.raises(pymysql.err.OperationalError):
        module.fetch("SELECT 2")
    with pytest.raises(pymysql.err.OperationalError):
        module.save_planet(1, "Lost")
    assert is_right(module) < 1
    assert not cache.exists("planet:2", "SELECT 2", "lock:planet:1")
    assert not warnings(caplog, module)
    own_mysql.start()
    assert module.planet(2) == {"id": 2, "name": "Venus"}
    assert cache.exists("planet:2")


@pytest.mark.parametrize("connected", [True, False])
def test_a_mysql_that_hangs_is_waited_for_once(connected, module, own_mysql):
    hurry(module, 1)
    if connected:
        is_right(module)
    own_mysql.pause()
    assert 0.9 < miss(module, 2) < 1.9
    if connected:
        assert is_right(module) < 0.4
    own_mysql.resume()
    wait_until(lambda: module.query("SELECT 1 AS one") == [{"one": 1}])
    assert module.planet(2) == {"id": 2, "name": "Venus"}


def test_a_query_that_takes_too_long_is_cut_off_and_not_repeated(example, db):
    hurry(example, 0.5)
    example.planet(1)
    before = selects(db)
    start = time.monotonic()
    with pytest.raises(pymysql.err.OperationalError):
        example.fetch("SELECT SLEEP(3), 'of the slow one'")
    assert time.monotonic() - start < 2
    assert selects(db) == before + 1
    assert example.fetch("SELECT 'of the next one' AS x") == [{"x": "of the next one"}]


def connection_id(module, number):
    """The number of this thread's connection; `number` keeps it out of the cache."""
    rows = module.fetch("SELECT CONNECTION_ID() AS id, %s AS number", (number,))
    return rows[0]["id"]


def test_a_connection_that_was_killed_is_replaced_unnoticed(example, db):
    before = connection_id(example, 1)
    assert connection_id(example, 2) == before
    db.execute("KILL %s", (before,))
    after = connection_id(example, 3)
    assert after != before
    db.execute("KILL %s", (after,))
    assert example.planet(1) == MERCURY
    db.execute("KILL %s", (connection_id(example, 4),))
    assert example.save_planet(9, "Pluto") == {"id": 9, "name": "Pluto"}
    db.execute("SELECT name FROM planet WHERE id = 9")
    assert db.fetchall() == (("Pluto",),)


def test_a_connection_that_was_idle_for_too_long_is_replaced_unnoticed(example, db):
    db.execute("SET GLOBAL wait_timeout = 1")
    try:
        before = connection_id(example, 1)
    finally:
        db.execute("SET GLOBAL wait_timeout = DEFAULT")

    def is_gone():
        sql = "SELECT id FROM information_schema.processlist WHERE id = %s"
        return not db.execute(sql, (before,))

    wait_until(is_gone)
    assert connection_id(example, 2) != before
    assert example.planet(1) == MERCURY


def test_a_mysql_that_was_restarted_is_reached_again_unnoticed(
    module, own_mysql, cache
):
    is_right(module)
    own_mysql.kill()
    own_mysql.start()
    cache.flushall()
    is_right(module)
    assert module.save_planet(1, "Mercurius")["name"] == "Mercurius"


def test_a_connection_killed_while_it_answers_leaves_a_thread_that_works(example, db):
    def killed():
        with contextlib.suppress(pymysql.Error):  # it may tell, or ask again
            example.fetch("SELECT SLEEP(0.5)")
        return is_right(example)

    call = begin(killed)
    sql = "SELECT id FROM information_schema.processlist WHERE info LIKE 'SELECT SL%'"
    wait_until(lambda: db.execute(sql))
    db.execute("KILL %s", (db.fetchone()[0],))
    assert call.result(10) < 1


# ---------------------------------------------------------------- processes that fork

FORK = """
import json, os, example

def ask(number):
    sql = "SELECT CONNECTION_ID() AS id, %s AS number"
    (row,) = example.fetch(sql, (number,))
    assert row["number"] == number
    return row["id"]

before = ask(0)
ids = []
for number in range(1, 5):
    reader, writer = os.pipe()
    if not os.fork():
        found = [ask(100 * number + n) for n in range(20)]
        assert example.planet(1) == {"id": 1, "name": "Mercury"}
        assert len(set(found)) == 1
        os.write(writer, json.dumps(found[0]).encode())
        os._exit(0)
    os.close(writer)
    ids.append(reader)
during = [ask(1000 + n) for n in range(20)]
children = [json.loads(os.read(reader, 100)) for reader in ids]
for _ in ids:
    assert os.wait()[1] == 0
print(json.dumps({"parent": [before, *during, ask(9999)], "children": children}))
"""


def test_processes_that_fork_never_share_a_connection(redis_server, mysql_server):
    environment = servers.environment(redis_server, mysql_server)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORK],
        env={**environment, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert len(set(found["parent"])) == 1  # the children's ends left it as it was
    assert len({*found["parent"], *found["children"]}) == 5


# ---------------------------------------------------------------- with the real numbers
# Nothing is shortened here. As they mostly wait, all of these happen at the same time.


def ten_seconds(module, *ids):
    """Call for ten seconds; how many of them were lost."""
    lost, end, ids = 0, time.monotonic() + 10, itertools.cycle(ids)
    while time.monotonic() < end:
        id = next(ids)
        answer, seconds = timed(module.planet, id)
        assert answer["id"] == id and answer["name"] != "Planted"
        if seconds > 0.1:  # else it is MySQL's own time
            lost += seconds
        time.sleep(0.05)
    return lost


def stopped_redis(server, module):
    """A Redis that is stopped for ten seconds: what that costs; when hits are back."""
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
    """A shard of a cluster that is away for ten seconds: the same."""
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
    """The id of some planet whose key belongs on this node of a cluster."""
    with plain(node) as client:
        for id in range(1, 9):
            with contextlib.suppress(redis.ResponseError):  # MOVED
                client.exists(f"planet:{id}")
                return id
    raise AssertionError("no planet belongs there")


def silent_port(silent, module, new_servers):
    """A port that accepts and never answers, and then is a Redis: the same."""
    lost = ten_seconds(module, 1)
    port = silent.getsockname()[1]
    silent.close()
    with plain(new_servers.redis(port=port, password="")) as cache:
        return lost, wait_until(lambda: is_hit(module, cache))


def killed_asker(mysql, asker, others):
    """A process that is killed while it asks: the SELECTs, and the crowd's answers."""
    with plain_mysql(mysql) as connection:
        db = connection.cursor()
        db.execute("LOCK TABLES planet WRITE")
        before = selects(db)
        asker.ask("planet", 1)
        wait_until(lambda: selects(db) == before + 1)
        start_crowd(others, "planet", 1)
        time.sleep(1)
        asker.process.kill()
        db.execute("UNLOCK TABLES")
        return outcomes(others), selects(db) - before


def hung_mysql(server, module):
    """A MySQL that hangs while 20 want the same: what each of them waits."""
    is_right(module)
    server.pause()
    start = time.monotonic()
    calls = [begin(miss, module, 2) for _ in range(20)]
    seconds = [call.result(30) for call in calls]
    hit = is_right(module)
    server.resume()
    assert time.monotonic() - start < 20
    return seconds, hit, module.planet(2)


@pytest.fixture(scope="module")
def meanwhile(breakable_mysql):
    """Start all of it; each test waits for its own."""
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(Servers())
        stopped, theirs, front = own.redis(), own.redis(), own.redis()
        shards = [begin(start_cluster, own) for _ in range(2)]
        locked = own.mysql()
        locked.client(PROJECT / "seed.sql")
        silent = stack.enter_context(socket.create_server(("127.0.0.1", free_port())))
        port = silent.getsockname()[1]
        environment = own.environment(theirs, locked)
        asker, *others = [stack.enter_context(Worker(environment)) for _ in range(3)]
        in_front = load(
            REDIS_URL=front.url,
            DB_PORT=str(breakable_mysql.port),
            DB_PASS=breakable_mysql.password,
        )
        in_front.TTL = 600
        shards = [cluster.result() for cluster in shards]
        killed, paused = [load(REDIS_URL=nodes[0].url) for nodes in shards]
        futures = {
            "killed shard": begin(broken_shard, "kill", shards[0], killed),
            "hung shard": begin(broken_shard, "pause", shards[1], paused),
            "stopped": begin(stopped_redis, stopped, load(REDIS_URL=stopped.url)),
            "silent": begin(
                silent_port, silent, load(REDIS_URL=f"redis://127.0.0.1:{port}"), own
            ),
            "killed": begin(killed_asker, locked, asker, others),
            "hung": begin(hung_mysql, breakable_mysql, in_front),
        }
        yield futures
        wait(futures.values())  # of those that no test has waited for
        for client in killed, paused:
            client.connect().close()  # redis-py leaves that to the garbage collector


def test_ten_seconds_of_calls_lose_less_than_one_to_a_redis_that_is_stopped(meanwhile):
    lost, back = meanwhile["stopped"].result(30)
    assert lost < 1
    assert back < 6


def test_ten_seconds_of_calls_lose_less_than_one_to_a_silent_port(meanwhile):
    lost, back = meanwhile["silent"].result(30)
    assert lost < 1
    assert back < 6


@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_ten_seconds_of_calls_lose_less_than_one_to_a_shard_that_is(fault, meanwhile):
    lost, back = meanwhile[f"{fault} shard"].result(30)
    assert lost < 1
    assert back < 6


def test_when_the_process_that_asks_is_killed_another_takes_over(meanwhile):
    results, asked = meanwhile["killed"].result(30)
    assert [result.get("answer") for result in results] == [MERCURY] * 50
    assert 5 < max(result["seconds"] for result in results) < 11
    assert asked == 2  # the one that was killed, and one of fifty


def test_twenty_who_miss_while_mysql_hangs_wait_for_two_timeouts_at_most(meanwhile):
    seconds, hit, after = meanwhile["hung"].result(30)
    assert 4 < min(seconds) < 6
    assert max(seconds) < 13
    assert hit < 1
    assert after == {"id": 2, "name": "Venus"}
