"""A Redis Cluster of three shards works as one node does."""

import time
from concurrent.futures import ThreadPoolExecutor

import pymysql
import pytest
import redis
from conftest import load
from servers import Servers
from tools import (
    MERCURY,
    is_paused,
    is_well,
    plain,
    plant,
    selects,
    start_cluster,
    wait_until,
    warnings,
)


@pytest.fixture(scope="module")
def nodes():
    with Servers() as own:
        yield start_cluster(own)


@pytest.fixture
def cache(nodes):
    """A client of the cluster, which is emptied."""
    with redis.RedisCluster.from_url(nodes[0].url) as client:
        client.flushall()
        yield client


@pytest.fixture
def modules(nodes, cache):
    """The sample three times, each with another node in REDIS_URL."""
    return [load(REDIS_URL=node.url) for node in nodes]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_node_will_do_and_keys_are_on_all_shards(number, modules, cache):
    module, shards = modules[number], set()
    for id in range(1, 9):
        sql = f"SELECT name FROM planet WHERE id = {id}"
        record, rows = module.planet(id), module.fetch(sql)
        assert record["id"] == id and rows == [{"name": record["name"]}]
        for key in f"planet:{id}", sql:
            assert 0 < cache.ttl(key) <= module.TTL
            plant(cache, key, record["name"])
            shards.add((key[:6], cache.get_node_from_key(key).port))
        assert module.planet(id) == {"id": id, "name": "Planted"}
        assert module.fetch(sql) == [{"name": "Planted"}]
    assert len(shards) == 2 * 3  # "planet" and "SELECT" on each


@pytest.mark.parametrize(
    "text", ["{}", "{a}", "}{", "{", "{{a}}", "{a}{b}", "a{}b{c}", "{planet:1}", "é{☿}"]
)
def test_sql_with_braces_in_it_is_cached(text, modules, cache, caplog):
    sql = f"SELECT '{text}' AS text, name FROM planet WHERE id = 1"
    row = {"text": text, "name": "Mercury"}
    assert modules[0].fetch(sql) == [row]
    plant(cache, modules[0].fetch_key(sql))
    assert modules[0].fetch(sql) == [{**row, "name": "Planted"}]
    assert modules[0].fetch("SELECT %s AS text", (text,)) == [{"text": text}]
    assert not warnings(caplog, modules[0])


def test_saves_and_rows_that_do_not_exist_are_cached(modules, db):
    module, other, _ = modules
    for id in range(9, 20):
        assert module.planet(id) is None and other.planet(id) is None
        new = {"id": id, "name": f"New {id}"}
        assert module.save_planet(id, new["name"]) == new
        before = selects(db)
        assert module.planet(id) == other.planet(id) == new
        assert selects(db) == before
    assert module.fetch("SELECT 1 FROM planet WHERE id > 99") == []
    with pytest.raises(pymysql.err.DataError):
        module.save_planet(9, "x" * 31)
    assert other.planet(9) == {"id": 9, "name": "New 9"}


def test_what_a_save_could_not_remove_is_removed_later(modules, cache):
    assert modules[0].planet(1) == MERCURY
    plant(cache, "planet:1")
    modules[0].failed_deletes["planet:1"] = 1
    assert modules[0].planet(1) == MERCURY


def test_a_user_without_the_right_to_look_for_the_nodes_gets_the_rows(nodes, modules):
    with redis.Redis.from_url(nodes[0].url) as node:
        node.execute_command("ACL SETUSER", "default", "-cluster")
        try:
            records = [modules[0].planet(id) for id in range(1, 9)]
        finally:
            node.execute_command("ACL SETUSER", "default", "+cluster")
    assert not is_paused(modules[0])  # it has served the keys of this node
    assert records == [modules[1].planet(id) for id in range(1, 9)]
    assert records == [modules[0].planet(id) for id in range(1, 9)]
    assert isinstance(modules[0].redis_client(), redis.RedisCluster)


@pytest.fixture
def move(nodes, cache):
    """Yield a function that moves the slot of planet:1 to another node, in two steps."""
    slot, port = cache.keyslot("planet:1"), cache.get_node_from_key("planet:1").port
    source, target = sorted(nodes, key=lambda node: node.port != port)[:2]
    source, target = plain(source), plain(target)
    ids = {node: node.execute_command("CLUSTER MYID") for node in (source, target)}

    def move(step, source=source, target=target):
        if step == "begin":
            target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
            source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
        for key in source.keys("*planet:1*"):
            host, port = "127.0.0.1", target.connection_pool.connection_kwargs["port"]
            args = "AUTH", "a-secret", "KEYS", key
            source.execute_command("MIGRATE", host, port, "", 0, 1000, *args)
        if step == "end":
            for node in target, source:
                node.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])

    yield move
    move("begin", target, source)
    move("end", target, source)


def test_a_key_that_moves_to_another_node_is_read_and_saved(move, modules, db):
    module, other, third = modules
    new, newer = {"id": 1, "name": "New"}, {"id": 1, "name": "Newer"}
    assert [module.planet(1) for module in modules] == 3 * [MERCURY]
    move("begin")
    assert module.save_planet(1, "New") == new
    assert module.planet(1) == other.planet(1) == new
    move("end")
    # Each module asks the old node once, and the new one from then on. There, the first module
    # deletes the old record, loads the new one, and stores it.
    for queries in 3, 1, 0:
        before = selects(db)
        assert [module.planet(1) for module in modules] == 3 * [new]
        assert selects(db) == before + queries
    assert not any(map(is_paused, modules))
    assert other.save_planet(1, "Newer") == newer
    assert module.planet(1) == other.planet(1) == third.planet(1) == newer


def test_callers_do_not_wait_in_turn_for_a_cluster_that_hangs(nodes, modules):
    assert all(modules[0].planet(id) for id in range(1, 9))
    for node in nodes:
        node.pause()
    start = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(modules[0].planet, 20 * [1]))
    seconds = time.monotonic() - start
    for node in nodes:
        node.resume()
    wait_until(lambda: all(map(is_well, nodes)))
    assert results == 20 * [MERCURY]
    assert seconds < 2  # one after the other, they would wait for 12 s


@pytest.mark.parametrize("text", ["a", "{}"])
def test_a_crowd_is_one_query(text, modules, cache, db):
    assert [module.planet(1) for module in modules] == 3 * [MERCURY]  # connects
    sql = f"SELECT '{text}' AS x, SLEEP(0.2) AS y"
    before, start = selects(db), time.monotonic()
    with ThreadPoolExecutor(60) as pool:
        results = pool.map(lambda number: modules[number % 3].fetch(sql), range(60))
    assert time.monotonic() - start < 1.5
    assert list(results) == 60 * [[{"x": text, "y": 0}]]
    assert selects(db) == before + 1
    assert not cache.exists(modules[0].name_of_lock(modules[0].fetch_key(sql)))
