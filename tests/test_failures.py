"""What a caller gets when Redis or MySQL fails, in the order of the README's table."""

import itertools
import threading
import time
from concurrent.futures import wait
from contextlib import ExitStack

import pymysql
import pytest
from conftest import PROJECT, load
from redis.connection import AbstractConnection
from servers import Servers, free_port
from tools import (
    MERCURY,
    Relay,
    Worker,
    begin,
    holders,
    is_paused,
    is_well,
    outcomes,
    plain,
    plain_mysql,
    plant,
    running,
    selects,
    shorten_timeouts,
    start_cluster,
    start_crowd,
    wait_until,
    warnings,
)

VENUS = {"id": 2, "name": "Venus"}
NAMES = "SELECT name FROM planet WHERE id < 3 ORDER BY id"
ROWS = [{"name": "Mercury"}, {"name": "Venus"}]


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def is_right(module):
    """Call both techniques, and return the seconds that they took."""
    start = time.perf_counter()
    assert module.planet(1) == MERCURY
    assert module.fetch(NAMES) == ROWS
    return time.perf_counter() - start


def is_used(server, module):
    """Whether the module stores a record in this Redis."""
    with plain(server) as cache:
        cache.delete("planet:1")
        return module.planet(1) == MERCURY and cache.exists("planet:1")


@pytest.fixture
def own_redis(new_servers):
    """A Redis that a test may break."""
    return new_servers.redis()


@pytest.fixture
def cached(own_redis):
    """The sample in front of that Redis."""
    return load(REDIS_URL=own_redis.url)


@pytest.fixture(scope="module")
def breakable_mysql():
    with Servers() as own:
        server = own.mysql()
        server.client(PROJECT / "seed.sql")
        yield server


# ---- Redis fails


def test_a_redis_that_is_down_costs_almost_nothing_and_is_reported_once(
    caplog, cached, own_redis
):
    own_redis.kill()
    assert is_right(cached) < 1
    assert is_paused(cached)
    times = [is_right(cached) for _ in range(100)]
    assert sorted(times)[50] < 0.005
    assert max(times) < 0.25  # the machine may be busy with something else
    cached.paused_until, cached.REDIS_PAUSE = 0, 0.01
    for _ in range(20):
        is_right(cached)
        time.sleep(0.02)  # so that the pause is over
    (warning,) = warnings(caplog, cached, own_redis.password)
    assert "refused" in warning
    cached.WARN_EVERY = 0.1  # that was longer ago
    is_right(cached)
    assert len(warnings(caplog, cached, own_redis.password)) == 2
    own_redis.start()
    wait_until(lambda: is_used(own_redis, cached))


def test_saves_do_not_prolong_the_pause(cached, own_redis, db):
    cached.REDIS_PAUSE = 3
    own_redis.kill()
    is_right(cached)
    end = cached.paused_until
    for _ in range(10):
        cached.save_planet(2, "Venus")
    assert is_paused(cached) and cached.paused_until == end
    own_redis.start()
    cached.redis_client()  # a save has made it in the pause
    own_redis.kill()
    cached.invalidate("planet:2")
    # It is not used after the pause.
    assert not cached.redis_client.cache_info().currsize
    assert is_paused(cached) and cached.paused_until == end
    own_redis.start()
    wait_until(lambda: is_used(own_redis, cached))


def test_a_wrong_password_is_reported_but_not_shown(caplog, own_redis):
    module = load(REDIS_URL=own_redis.url.replace(own_redis.password, "a-secret"))
    assert is_right(module) < 1
    assert is_right(module) < 0.2
    (warning,) = warnings(caplog, module, "a-secret", own_redis.password)
    assert "password" in warning


def test_a_user_who_may_not_use_info_can_use_the_cache(caplog, own_redis):
    rights = {"commands": ["+@all", "-@dangerous"], "keys": "*"}
    with plain(own_redis) as cache:
        cache.acl_setuser("guest", enabled=True, nopass=True, **rights)
    module = load(REDIS_URL=f"redis://guest:any@127.0.0.1:{own_redis.port}")
    assert is_used(own_redis, module)
    assert not warnings(caplog, module)


def test_a_redis_without_info_can_be_used(caplog, new_servers):
    server = new_servers.redis("--rename-command", "INFO", "", password="")
    module = load(REDIS_URL=server.url)
    assert is_used(server, module)
    assert not warnings(caplog, module)


def test_a_redis_that_loads_its_data_counts_as_down(caplog, new_servers):
    # It takes 1 ms to load a key, and listens to clients after each KB.
    slowly = "--key-load-delay 1000 --loading-process-events-interval-bytes 1024"
    server = new_servers.redis(*slowly.split(), password="")  # so that PING needs none
    with plain(server) as cache:
        cache.mset({f"some data {number}": "x" * 100 for number in range(1000)})
        cache.save()
    server.kill()
    server.launch(*server.command())
    wait_until(lambda: server.ask(b"PING\r\n").startswith(b"-LOADING"))
    module = load(REDIS_URL=server.url)
    assert is_right(module) < 1
    (warning,) = warnings(caplog, module)
    assert "loading" in warning.lower()


def test_a_cluster_that_serves_no_keys_is_not_used_for_a_while(new_servers):
    args = ["--cluster-enabled", "yes", "--cluster-port"]
    server = new_servers.redis(*args, free_port())
    module = load(REDIS_URL=server.url)
    is_right(module)
    with plain(server) as client:
        before = client.info("stats")["total_connections_received"]
        assert is_right(module) < 1
        assert client.info("stats")["total_connections_received"] == before


def lost_in_ten_seconds(fault, nodes, module):
    """Break the last node. Return what calls lost, and how soon it was used again."""
    ids = range(1, 9)
    assert all(module.planet(id) for id in ids)
    assert any(nodes[-1] in holders(nodes, f"planet:{id}") for id in ids)
    getattr(nodes[-1], fault)()
    lost, end = 0, time.monotonic() + 10
    while time.monotonic() < end:
        for id in ids:
            result, seconds = timed(module.planet, id)
            assert result["id"] == id
            lost += seconds if seconds > 0.1 else 0  # less is MySQL's own time
            time.sleep(0.05)
    for id in ids:  # on whichever node: one that works reports CLUSTERDOWN
        module.paused_until = 0
        assert module.planet(id)["id"] == id and is_paused(module)
    nodes[-1].start() if fault == "kill" else nodes[-1].resume()
    wait_until(lambda: len(nodes) == 1 or all(map(is_well, nodes)))
    # By now the records from before have expired.
    stored = lambda id: module.planet(id) and holders(nodes, f"planet:{id}")
    back = wait_until(lambda: all(map(stored, ids)))
    module.redis_client().close()  # redis-py would leave it to the garbage collector
    return lost, back


def killed_loader(mysql, environment):
    """Kill a process that loads. Return the results of 50 others, and the SELECTs."""
    with plain_mysql(mysql) as connection, connection.cursor() as db:
        db.execute("LOCK TABLES planet WRITE")
        before = selects(db)
        with Worker(environment) as loader, Worker(environment) as other:
            loader.ask("planet", 1)
            wait_until(lambda: selects(db) == before + 1)
            start_crowd([other], "planet", 1, threads=50)
            time.sleep(1)
            loader.process.kill()
            db.execute("UNLOCK TABLES")
            return outcomes([other]), selects(db) - before


@pytest.fixture(scope="module")
def at_once(breakable_mysql):
    """Start what takes the real times, all at once. Each test waits for its result."""
    with Servers() as own:
        clusters = [begin(start_cluster, own) for _ in range(2)]
        run = lambda fault, nodes: begin(
            lost_in_ten_seconds, fault, nodes, load(REDIS_URL=nodes[0].url)
        )
        environment = own.environment(own.redis(), breakable_mysql)
        futures = {
            "redis hangs": run("pause", [own.redis()]),
            "shard hangs": run("pause", clusters[0].result()),
            "shard is killed": run("kill", clusters[1].result()),
            "loader": begin(killed_loader, breakable_mysql, environment),
        }
        yield futures
        wait(futures.values())  # also for those that no test has waited for


@pytest.mark.parametrize("fault", ["redis hangs", "shard hangs", "shard is killed"])
def test_ten_seconds_of_calls_lose_less_than_one_to_a_redis_that_hangs(fault, at_once):
    lost, back = at_once[fault].result(30)
    assert lost < 1
    assert back < 6


@pytest.mark.parametrize("fault", ["pause", "kill"])
@pytest.mark.parametrize("moment", ["query", "store_if_lock_held"])
def test_a_loaded_result_is_not_loaded_again(fault, moment, cached, own_redis, db):
    function = getattr(cached, moment)

    def then_break(*args):
        setattr(cached, moment, function)  # this breaks Redis only once
        result = function(*args)
        getattr(own_redis, fault)()
        return result

    cached.planet(2)
    setattr(cached, moment, then_break)
    before = selects(db)
    result, seconds = timed(cached.planet, 1)
    assert (result, selects(db)) == (MERCURY, before + 1)
    assert is_paused(cached)
    assert seconds < 1.5  # to store and to release the lock are several timeouts


def test_a_redis_killed_and_restarted_between_calls_is_hardly_noticed(
    cached, own_redis
):
    for _ in range(3):
        is_right(cached)
        own_redis.kill()
        own_redis.start()
        calls = [begin(is_right, cached) for _ in range(4)]
        assert max(call.result(30) for call in calls) < 1
        assert is_used(own_redis, cached)


def assert_hits_are_served(module, cache, refuse_writes):
    module.TTL = 600
    is_right(module)
    plant(cache, "planet:1")
    plant(cache, NAMES)
    refuse_writes()
    for _ in range(10):
        assert module.planet(1) == {"id": 1, "name": "Planted"}
        assert module.fetch(NAMES) == [{"name": "Planted"}, {"name": "Venus"}]
        result, seconds = timed(module.planet, 2)
        assert result == VENUS and seconds < 1
        assert module.planet(99) is None


def test_a_full_redis_costs_no_result_and_serves_hits(caplog, cached, own_redis):
    with plain(own_redis) as cache:
        assert_hits_are_served(cached, cache, lambda: cache.config_set("maxmemory", 1))
        (warning,) = warnings(caplog, cached, own_redis.password)
        assert "maxmemory" in warning
        cache.config_set("maxmemory", 0)
        cache.flushall()
    assert is_used(own_redis, cached)  # at once: it was not paused
    own_redis.kill()
    assert is_right(cached) < 1
    assert "refused" in warnings(caplog, cached)[1]  # another kind of failure


def test_a_redis_that_becomes_full_during_a_load_keeps_data_out_of_the_log(
    caplog, cached, own_redis
):
    query = cached.query
    with plain(own_redis) as cache:
        fill = lambda *args: (query(*args), cache.config_set("maxmemory", 1))[0]
        cached.query = fill
        assert cached.planet(2) == VENUS
    (warning,) = warnings(caplog, cached, "planet:2", "Venus")
    assert "maxmemory" in warning


def test_a_redis_without_a_command_keeps_data_out_of_the_log(caplog, new_servers):
    server = new_servers.redis("--rename-command", "SETEX", "")
    module = load(REDIS_URL=server.url)
    assert module.fetch(NAMES) == ROWS
    (warning,) = warnings(caplog, module, NAMES, "Venus")
    assert "SETEX" in warning


def test_a_read_only_redis_costs_no_result_and_serves_hits(caplog, new_servers):
    # The relay is the host name of a primary endpoint. After a failover it leads to
    # another node, but connections to the old one stay.
    old, new = new_servers.redis(password=""), new_servers.redis(password="")
    with Relay(old.port) as relay, plain(old) as demoted:
        module = load(REDIS_URL=f"redis://127.0.0.1:{relay.port}")
        assert_hits_are_served(module, demoted, lambda: demoted.replicaof("::1", 1))
        (warning,) = warnings(caplog, module)
        assert "read only" in warning
        relay.target = new.port
        assert is_used(new, module)  # at once: it was not paused
        # If a node hangs, connections to it hang even when the name leads elsewhere.
        module.REDIS_PAUSE, newest = 0.1, new_servers.redis(password="")
        relay.target = newest.port
        new.pause()
        assert module.planet(2) == VENUS
        time.sleep(0.1)
        assert is_used(newest, module)


GARBAGE = {
    "empty": "",
    "not JSON": "Mercury",
    "truncated": '"Mercu',
    "more than JSON": "1 Mercury",
    "not UTF-8": b'"\xff\xfe"',
    "too deep": "[" * 100_000,
    "from the tutorial of 2019": '[{"name": "Planted"}]',
    "a pickle that ends the program": "csys\nexit\n(tR.",
    "an unknown type": '{"type":"eval","value":"exit()"}',
    "no type": '{"value":"1"}',
    "not a number": '{"type":"Decimal","value":"Mercury"}',
    "not text": '{"type":"date","value":2019}',
    "an infinite time": '{"type":"timedelta","value":1e999}',
    "another type of key": None,
}


@pytest.mark.parametrize("technique", ["fetch", "planet"])
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=list(GARBAGE))
def test_a_value_that_cannot_be_read_is_a_miss_is_replaced_and_is_reported(
    technique, garbage, example, cache, caplog
):
    key = NAMES if technique == "fetch" else "planet:1"
    if garbage is None:
        cache.rpush(key, "1")
    elif technique == "fetch":
        cache.set(key, garbage)
    else:
        cache.hset(key, mapping={"id": "1", "name": garbage})
    is_right(example)
    assert 0 < cache.ttl(key) <= example.TTL
    plant(cache, key)
    assert "Planted" in str((example.fetch(NAMES), example.planet(1)))
    (warning,) = warnings(caplog, example)
    assert "cannot be read" in warning
    assert not any(word in warning for word in ("Mercu", "Planted", "exit"))


def test_a_value_that_this_user_may_not_read_stays(cached, own_redis, caplog):
    is_right(cached)
    with plain(own_redis) as cache:
        cache.execute_command("ACL SETUSER", "default", "-get", "-hgetall")
        is_right(cached)
        assert cache.exists(NAMES, "planet:1") == 2
    (warning,) = warnings(caplog, cached)
    assert "no permissions" in warning
    assert not is_paused(cached)


def test_a_connection_lost_before_exec_is_reported(example, cache, caplog):
    rows_to_json = example.rows_to_json
    kill = lambda: cache.client_kill_filter(_type="normal", skipme=True)
    example.rows_to_json = lambda rows: (rows_to_json(rows), kill())[0]
    assert example.fetch("SELECT 1 AS x") == [{"x": 1}]
    (warning,) = warnings(caplog, example)
    assert "while watching" in warning
    assert not is_paused(example)
    assert not cache.keys()  # the lock is gone


def test_a_mistake_in_a_decoder_or_a_key_is_raised(example, cache):
    example.planet(1)
    example.from_json = lambda text: text.no_such_method()
    with pytest.raises(AttributeError):
        example.planet(1)
    with pytest.raises(TypeError):
        example.record(("planet", 1), "SELECT 1 AS x")
    assert not is_paused(example)


class TimeLimit(Exception):
    """What a job queue raises in the handler of a signal."""


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, TimeLimit])
@pytest.mark.parametrize("number", range(1, 13))
def test_after_an_interrupted_call_the_next_ones_get_their_own_rows(
    number, interruption, own_redis, monkeypatch
):
    send = AbstractConnection.send_packed_command
    commands = itertools.count(1)

    def interrupted(*args, **kwargs):
        """Raise the error after this command, whose reply comes 50 ms later."""
        now = next(commands) == number
        if now:
            relay.hold()
            threading.Timer(0.05, relay.release).start()
        send(*args, **kwargs)
        if now:
            raise interruption

    with Relay(own_redis.port) as relay:
        port = str(own_redis.port)
        module = load(REDIS_URL=own_redis.url.replace(port, str(relay.port)))
        assert all(map(module.planet, [2, 3]))
        client = module.redis_client()
        monkeypatch.setattr(AbstractConnection, "send_packed_command", interrupted)
        start = time.monotonic()
        # A miss, of seven commands, and hits.
        calls = [(module.planet, id) for id in (1, 2, 3, 2, 3)]
        interruptions = 0
        for function, argument in [*calls, (module.invalidate, "planet:1")]:
            try:
                result = function(argument)
                assert function is module.invalidate or result["id"] == argument
            except interruption:
                interruptions += 1
        assert interruptions == 1
        assert [*module.failed_deletes] == (["planet:1"] if number == 12 else [])
        assert time.monotonic() - start < 1
        assert module.redis_client() is not client


def test_if_the_process_that_loads_is_killed_another_one_loads(at_once):
    results, queries = at_once["loader"].result(30)
    assert [result.get("answer") for result in results] == [MERCURY] * 50
    assert 8 < max(result["seconds"] for result in results) < 12
    assert queries == 2  # by the one that was killed, and by one of fifty


# ---- MySQL fails


@pytest.fixture
def module(breakable_mysql, cache):
    """The sample in front of a MySQL that a test may break and must repair."""
    return load(DB_PORT=str(breakable_mysql.port), DB_PASS=breakable_mysql.password)


def failed_miss(module, id, message=None):
    """Call for a planet that MySQL cannot load. Return the seconds that this took."""
    start = time.monotonic()
    with pytest.raises(pymysql.err.OperationalError, match=message):
        module.planet(id)
    return time.monotonic() - start


def test_a_connection_that_mysql_has_closed_is_replaced_unnoticed(example, db):
    def connection_id(number):  # each number makes a miss
        rows = example.fetch("SELECT CONNECTION_ID() AS id, %s AS number", (number,))
        return rows[0]["id"]

    before = connection_id(1)
    assert connection_id(2) == before
    db.execute("KILL %s", (before,))
    after = connection_id(3)
    assert after != before
    db.execute("KILL %s", (after,))
    assert example.save_planet(9, "Pluto") == {"id": 9, "name": "Pluto"}


def test_while_mysql_is_down_hits_are_served_and_misses_fail_at_once(
    module, breakable_mysql, cache, caplog
):
    is_right(module)
    client = module.redis_client()
    breakable_mysql.kill()
    assert is_right(module) < 1
    for call in [begin(failed_miss, module, 2) for _ in range(20)]:
        assert call.result(30) < 3
    with pytest.raises(pymysql.err.OperationalError):
        module.save_planet(2, "Lost")
    assert not cache.exists("planet:2", "lock:{planet:2}")
    assert not warnings(caplog, module)
    assert module.redis_client() is client  # errors of MySQL do not replace it
    breakable_mysql.start()
    assert module.planet(2) == VENUS


def test_callers_that_miss_while_mysql_hangs_get_its_error_within_seconds(
    module, breakable_mysql
):
    shorten_timeouts(module)
    assert module.MAX_WAIT == 15
    module.MAX_WAIT = 0.5
    is_right(module)
    breakable_mysql.pause()
    assert 0.4 < failed_miss(module, 2) < 1.4  # the idle connection, then a new one
    assert 0.4 < failed_miss(module, 2) < 0.9  # a new connection only
    calls = [begin(failed_miss, module, 2) for _ in range(25)]
    assert max(call.result(30) for call in calls) < 2  # MAX_WAIT and three timeouts
    assert is_right(module) < 0.4
    breakable_mysql.resume()
    assert module.planet(2) == VENUS


def test_a_query_that_takes_too_long_is_cut_off_and_not_repeated(example, db):
    shorten_timeouts(example)
    before = selects(db)
    start = time.monotonic()
    with pytest.raises(pymysql.err.OperationalError, match="execution was"):
        example.fetch("SELECT SLEEP(30), id FROM planet")
    assert time.monotonic() - start < 2
    assert selects(db) == before + 1
    assert not running(db, "SLEEP")
    assert example.fetch("SELECT 'of the next one' AS x") == [{"x": "of the next one"}]


def test_the_threads_of_a_process_share_twenty_connections(example, db):
    sql = "SELECT SLEEP(0.3), CONNECTION_ID() AS id, %s"
    calls = [begin(example.fetch, sql, (number,)) for number in range(30)]
    wait_until(lambda: running(db, "SLEEP") == 20)
    ids = {call.result(10)[0]["id"] for call in calls}
    assert len(ids) == example.MAX_CONNECTIONS == 20


def test_a_call_for_which_no_connection_becomes_free_raises_an_error(example):
    shorten_timeouts(example)
    assert example.planet(1) == MERCURY
    with ExitStack() as stack:
        for _ in range(example.MAX_CONNECTIONS):
            stack.enter_context(example.mysql_connection())
        call = begin(failed_miss, example, 2, "1040, .all MAX_CONNECTIONS are in use")
        assert 0.4 < call.result(2)
        assert example.planet(1) == MERCURY  # a hit
    assert example.planet(2) == VENUS
