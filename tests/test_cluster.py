"""A Redis Cluster of three shards: all that concerns one key works as on one node."""

import contextlib
import time

import pymysql
import pytest
from conftest import load, servers
from servers import Servers, free_port
from tools import (
    Sent,
    Worker,
    begin,
    holders,
    outcomes,
    plain,
    plant,
    selects,
    start_cluster,
    start_crowd,
    start_node,
    unite,
    wait_until,
    warnings,
)

MERCURY = {"id": 1, "name": "Mercury"}


@pytest.fixture(scope="module")
def cluster():
    with Servers() as own:
        yield start_cluster(own)


@pytest.fixture(autouse=True)
def empty(request):
    """Empty the cluster that all tests but the destructive ones share."""
    if "cluster" in request.fixturenames:
        for node in request.getfixturevalue("cluster"):
            with plain(node) as client:
                client.flushall()


@pytest.fixture
def load_for():
    """load(), for a cluster: what redis-py would leave open is closed."""
    with contextlib.ExitStack() as stack:

        def load_for(url):
            module = load(REDIS_URL=url)
            stack.callback(lambda: module.redis_client().close())
            return module

        yield load_for


@pytest.fixture
def module(load_for, cluster):
    return load_for(cluster[0].url)


@contextlib.contextmanager
def home(nodes, key):
    """A plain client of the one node that holds the key."""
    (node,) = holders(nodes, key)
    with plain(node) as client:
        yield client


# ---------------------------------------------------------------- in good health


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_node_will_do(number, load_for, cluster, db):
    module = load_for(cluster[number].url)
    for id in range(1, 9):
        sql = f"SELECT name FROM planet WHERE id = {id}"
        record, rows = module.planet(id), module.fetch(sql)
        assert record["id"] == id and rows == [{"name": record["name"]}]
        for key in f"planet:{id}", sql:
            with home(cluster, key) as client:
                assert 0 < client.ttl(key) <= module.TTL
                plant(client, key, record["name"])
        assert module.planet(id) == {"id": id, "name": "Planted"}
        assert module.fetch(sql) == [{"name": "Planted"}]


def test_keys_land_on_every_shard(module, cluster):
    for id in range(1, 40):
        module.planet(id)
        module.fetch("SELECT %s AS id", (id,))
    for node in cluster:
        with plain(node) as client:
            keys = client.keys()
            assert any(key.startswith(b"planet:") for key in keys)
            assert any(key.startswith(b"SELECT") for key in keys)
            assert all(0 < client.ttl(key) <= module.TTL for key in keys)


@pytest.mark.parametrize(
    "text", ["{}", "{a}", "}{", "{", "{{a}}", "{a}{b}", "a{}b{c}", "{planet:1}", "é{☿}"]
)
def test_sql_with_braces_in_it_is_cached(text, module, cluster, caplog):
    sql = f"SELECT '{text}' AS text, name FROM planet WHERE id = 1"
    row = {"text": text, "name": "Mercury"}
    assert module.fetch(sql) == [row]
    with home(cluster, sql) as client:
        plant(client, sql)
    assert module.fetch(sql) == [{**row, "name": "Planted"}]
    assert module.fetch("SELECT %s AS text", (text,)) == [{"text": text}]
    assert not warnings(caplog, module)


def test_absent_planets_empty_results_and_saves_are_as_on_one_node(
    load_for, module, cluster, db
):
    other = load_for(cluster[1].url)
    for id in range(9, 20):
        assert module.planet(id) is None and other.planet(id) is None
        assert module.save_planet(id, f"New {id}") == {"id": id, "name": f"New {id}"}
        assert other.planet(id) == {"id": id, "name": f"New {id}"}
        before = selects(db)
        assert module.planet(id) == other.planet(id) == {"id": id, "name": f"New {id}"}
        assert selects(db) == before
    assert module.fetch("SELECT 1 FROM planet WHERE id > 99") == []
    with pytest.raises(pymysql.err.DataError):
        module.save_planet(9, "x" * 31)
    assert other.planet(9) == {"id": 9, "name": "New 9"}


@pytest.mark.parametrize("type", ["text", "hash", "list"])
def test_garbage_is_a_miss_and_is_replaced(type, module, cluster):
    module.planet(1)
    module.fetch("SELECT 1 AS one")
    for key in "planet:1", "SELECT 1 AS one":
        with home(cluster, key) as client:
            client.delete(key)
            if type == "text":
                client.set(key, b"\xffgarbage")
            elif type == "hash":
                client.hset(key, "garbage", "garbage")
            else:
                client.rpush(key, "garbage")
    assert module.planet(1) == MERCURY
    assert module.fetch("SELECT 1 AS one") == [{"one": 1}]
    with home(cluster, "planet:1") as client:
        assert 0 < client.ttl("planet:1") <= module.TTL
    with home(cluster, "SELECT 1 AS one") as client:
        assert 0 < client.ttl("SELECT 1 AS one") <= module.TTL


def test_a_crowd_is_one_select(cluster, mysql_server, db):
    environment = servers.environment(cluster[0], mysql_server)
    with Worker(environment) as one, Worker(environment) as two:
        assert one.answer("planet", 1) == two.answer("planet", 1) == MERCURY
        before = selects(db)
        for sql in "SELECT 'a' AS x, SLEEP(0.2)", "SELECT '{}' AS x, SLEEP(0.2)":
            start_crowd([one, two], "fetch", sql)
            results = outcomes([one, two])
            assert len({str(result["answer"]) for result in results}) == 1
            assert max(result["seconds"] for result in results) < 1.5
            before += 1
            assert selects(db) == before
            assert len(holders(cluster, f"lock:{sql}")) == 0


def test_a_hit_is_one_command(module, cluster):
    module.planet(1)
    with home(cluster, "planet:1") as client, Sent(client) as sent:
        assert module.planet(1) == MERCURY
    assert sent.commands == ["HGETALL"]


# ---------------------------------------------------------------- from the beginning


def test_a_cluster_that_is_down_at_import_is_found_when_it_comes_up(
    caplog, new_servers, load_for
):
    port = free_port()
    module = load_for(f"redis://:a-secret@127.0.0.1:{port}")
    module.REDIS_PAUSE = 0.1

    def is_right():
        start = time.monotonic()
        assert module.planet(1) == MERCURY
        assert module.fetch("SELECT 1 AS one") == [{"one": 1}]
        return time.monotonic() - start < 2

    assert is_right()
    nodes = [start_node(new_servers, "a-secret", port)]
    nodes += [start_node(new_servers, "a-secret") for _ in range(2)]
    assert is_right()  # there are nodes, but they are no cluster yet
    united = begin(unite, nodes)
    while not united.done():
        assert is_right()
        time.sleep(0.1)
    united.result()
    wait_until(lambda: is_right() and holders(nodes, "planet:1"))
    wait_until(lambda: is_right() and holders(nodes, "SELECT 1 AS one"))
    with home(nodes, "planet:1") as client:
        plant(client, "planet:1")
    assert module.planet(1) == {"id": 1, "name": "Planted"}
    assert len(warnings(caplog, module, "a-secret")) == 1
