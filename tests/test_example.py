"""What the sample returns and what it keeps in Redis while nothing fails."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, time, timedelta
from decimal import Decimal

import pymysql
import pytest
from conftest import PROJECT, load, servers
from tools import plant, selects

PLANETS = "SELECT * FROM planet"
MERCURY = {"id": 1, "name": "Mercury"}
SCRIPT = str(PROJECT / "example.py")

# MySQL type, the value as SQL, the value as PyMySQL returns it
TYPES = [
    ("TINYINT", "-128", -128),
    ("INT", "NULL", None),
    ("BIGINT UNSIGNED", "18446744073709551615", 18446744073709551615),
    ("DECIMAL(30,10)", "1.5", Decimal("1.5000000000")),
    ("DECIMAL(10,2)", "-0.10", Decimal("-0.10")),
    ("DECIMAL(20,18)", "0.000000000000000001", Decimal("1E-18")),
    ("FLOAT", "1.1", 1.1),
    ("DOUBLE", "1e-300", 1e-300),
    ("CHAR(3)", "'a b'", "a b"),
    ("VARCHAR(30)", "''", ""),
    ("VARCHAR(30)", "'null'", "null"),
    ("VARCHAR(30)", "'Zemlja \U0001f30d \\\\ \\\" \\n'", 'Zemlja \U0001f30d \\ " \n'),
    ("TEXT", '\'{"Decimal":"1.5"}\'', '{"Decimal":"1.5"}'),
    ("LONGTEXT", "REPEAT('x', 100000)", "x" * 100000),
    ("BINARY(4)", "X'00FF80'", b"\x00\xff\x80\x00"),
    ("VARBINARY(9)", "''", b""),
    ("BLOB", "X'C328'", b"\xc3\x28"),
    ("BIT(1)", "b'1'", b"\x01"),
    ("BIT(10)", "b'1000000001'", b"\x02\x01"),
    ("DATE", "'2019-07-25'", date(2019, 7, 25)),
    ("DATE", "'0000-00-00'", "0000-00-00"),
    ("DATE", "'2019-00-10'", "2019-00-10"),
    ("DATETIME", "'0000-00-00 00:00:00'", "0000-00-00 00:00:00"),
    ("DATETIME", "'2019-07-25 00:00:00'", datetime(2019, 7, 25)),
    (
        "DATETIME(6)",
        "'2019-07-25 01:02:03.000004'",
        datetime(2019, 7, 25, 1, 2, 3, 4),
    ),
    ("TIMESTAMP NULL", "'2019-07-25 01:02:03'", datetime(2019, 7, 25, 1, 2, 3)),
    ("TIME", "'-00:30:00'", -timedelta(minutes=30)),
    ("TIME", "'838:59:59'", timedelta(hours=838, minutes=59, seconds=59)),
    ("TIME(6)", "'-01:00:00.000001'", -timedelta(hours=1, microseconds=1)),
    ("YEAR", "2019", 2019),
    ("ENUM('a','b')", "'b'", "b"),
    ("SET('a','b')", "'a,b'", "a,b"),
    ("JSON", '\'["Decimal", "1.5"]\'', '["Decimal", "1.5"]'),
    ("POINT", "POINT(1, 2)", None),
]


@pytest.fixture
def queries(db):
    """How many SELECTs MySQL has run since the last call."""
    seen = selects(db)

    def since():
        nonlocal seen
        before, seen = seen, selects(db)
        return seen - before

    return since


def with_types(value):
    """The value with the type of each part: 1 == True == Decimal(1), but not here."""
    if isinstance(value, list):
        return [with_types(item) for item in value]
    if isinstance(value, dict):
        return {name: with_types(item) for name, item in value.items()}
    return type(value), repr(value)


# ---------------------------------------------------------------- a hit equals the miss


@pytest.mark.parametrize(("type", "sql", "expected"), TYPES)
def test_a_hit_equals_the_miss_for_every_type(
    example, cache, db, queries, type, sql, expected
):
    db.execute("SET sql_mode = ''")
    db.execute(f"CREATE TABLE thing (value {type}, nothing {type})")
    db.execute(f"INSERT INTO thing VALUES ({sql}, NULL), (NULL, NULL), ({sql}, NULL)")
    queries()
    rows = [example.fetch("SELECT * FROM thing") for _ in "12"]
    row = [example.record("thing", "SELECT * FROM thing LIMIT 1") for _ in "12"]
    assert queries() == 2
    assert with_types(rows[0]) == with_types(rows[1])
    assert with_types(row[0]) == with_types(row[1]) == with_types(rows[0][0])
    assert rows[0][1] == {"value": None, "nothing": None}
    if expected is not None:
        assert with_types(row[0]["value"]) == with_types(expected)


def test_a_column_of_one_type_and_of_several_equals_the_miss(
    example, cache, db, queries
):
    db.execute("SET sql_mode = ''")
    db.execute("CREATE TABLE thing (mixed DATE, day DATE, price DECIMAL(3,1))")
    db.execute("INSERT INTO thing VALUES ('2019-07-25', '2019-07-25', 1.5)")
    db.execute("INSERT INTO thing VALUES (0, '2019-07-26', 2.5), (NULL, '19-07-27', 3)")
    queries()
    rows = [example.fetch("SELECT * FROM thing") for _ in "12"]
    assert queries() == 1
    assert with_types(rows[0]) == with_types(rows[1])
    assert [row["mixed"] for row in rows[1]] == [date(2019, 7, 25), "0000-00-00", None]


@pytest.mark.parametrize(
    "columns",
    [
        "'1.5' AS `Decimal`",
        "'1.5' AS `Decimal`, 'x' AS `columns`, '[]' AS `rows`",
        "'[1]' AS `bytes`, NULL AS `datetime`, '' AS ` x`",
        "'' AS `absent`",
        "1 AS `same`, 2 AS `same`",
    ],
)
def test_no_name_of_a_column_is_special(example, cache, queries, columns):
    sql = f"SELECT {columns}"
    rows = [example.fetch(sql) for _ in "12"]
    row = [example.record("thing", sql) for _ in "12"]
    assert queries() == 2
    assert with_types(rows[0]) == with_types(rows[1])
    assert with_types(row[0]) == with_types(row[1]) == with_types(rows[0][0])


def test_no_rows_and_no_record_are_results_too(example, cache, queries):
    sql = "SELECT * FROM planet WHERE id > 100"
    assert [example.fetch(sql) for _ in "123"] == [[], [], []]
    assert {example.planet(99) for _ in "123"} == {None}
    assert queries() == 2
    assert 0 < cache.pttl("planet:99") <= 10_000


# ---------------------------------------------------------------- what is in Redis


def test_fetch_keeps_a_string_under_the_text_of_the_query(example, cache):
    rows = example.fetch(PLANETS)
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert cache.keys() == [PLANETS.encode()]
    names, columns = json.loads(cache.get(PLANETS))
    assert (names, columns[1][:2]) == (["id", "name"], ["Mercury", "Venus"])
    assert 0 < cache.pttl(PLANETS) <= 10_000


def test_planet_keeps_a_hash_under_its_id(example, cache):
    assert example.planet(1) == MERCURY
    assert cache.keys() == [b"planet:1"]
    assert cache.hgetall("planet:1") == {b"id": b"1", b"name": b'"Mercury"'}
    assert 0 < cache.pttl("planet:1") <= 10_000


def test_a_hit_comes_from_redis(example, cache, queries):
    example.fetch(PLANETS), example.planet(1)
    plant(cache, PLANETS)
    plant(cache, "planet:1")
    queries()
    assert example.fetch(PLANETS)[0] == {"id": 1, "name": "Planted"}
    assert example.planet(1) == {"id": 1, "name": "Planted"}
    assert queries() == 0


@pytest.mark.parametrize("ttl", [60, 60.5, "60"])
def test_the_ttl_is_read_at_each_call_and_no_key_is_without(example, cache, ttl):
    example.TTL = ttl
    example.fetch(PLANETS), example.planet(1), example.planet(99)
    assert all(10 < cache.ttl(key) <= 60 for key in cache.scan_iter())
    assert len(cache.keys()) == 3


def test_the_database_is_queried_again_after_the_ttl(example, cache, db):
    assert example.planet(3)["name"] == example.fetch(PLANETS)[2]["name"] == "Earth"
    db.execute("UPDATE planet SET name = 'Gaia' WHERE id = 3")
    assert example.planet(3)["name"] == example.fetch(PLANETS)[2]["name"] == "Earth"
    cache.delete("planet:3", PLANETS)  # as Redis does after the TTL
    assert example.planet(3)["name"] == example.fetch(PLANETS)[2]["name"] == "Gaia"


def test_the_fields_of_an_older_record_do_not_remain(example, cache):
    example.record("thing", "SELECT 1 AS a, 2 AS b")
    cache.hset("thing", "a", "no JSON")
    assert example.record("thing", "SELECT 1 AS a") == {"a": 1}
    assert example.record("thing", "SELECT 1 AS a") == {"a": 1}


# ---------------------------------------------------------------- ids and arguments


@pytest.mark.parametrize("id", [1, "1", " 1 ", "001", Decimal(1)])
def test_an_id_is_a_whole_number_or_text_of_one(example, cache, db, id):
    assert example.planet(id) == MERCURY
    assert cache.keys() == [b"planet:1"]
    assert example.save_planet(id, "New") == {"id": 1, "name": "New"}


@pytest.mark.parametrize(
    "id", [1.5, 1.0, "1abc", "1 OR 1=1", None, "", "1.0", b"1", [1], True, "0x1"]
)
def test_any_other_id_reaches_neither_server(example, cache, queries, id):
    with pytest.raises((ValueError, TypeError)):
        example.planet(id)
    with pytest.raises((ValueError, TypeError)):
        example.save_planet(id, "Vulcan")
    assert cache.keys() == []
    assert queries() == 0


def test_arguments_are_escaped_and_part_of_the_key(example, cache):
    sql = "SELECT name FROM planet WHERE id = %s OR name = %s"
    assert example.fetch(sql, (1, "' OR 1=1 -- ")) == [{"name": "Mercury"}]
    assert example.fetch(sql, (2, "x")) == [{"name": "Venus"}]
    assert all(key.startswith(sql.encode()) for key in cache.scan_iter())
    assert len(cache.keys()) == 2
    by_name = "SELECT id FROM planet WHERE name = %(name)s"
    assert example.fetch(by_name, {"name": "Mars"}) == [{"id": 4}]


def test_arguments_of_other_types_are_other_arguments(example, cache):
    arguments = 1, "1", Decimal("1.0"), b"1", None, date(2019, 7, 25), time(1, 2)
    results = [example.fetch("SELECT %s AS x", [x])[0]["x"] for x in arguments]
    assert results == [1, "1", Decimal("1.0"), b"1", None, "2019-07-25", "01:02:00"]
    assert len(cache.keys()) == len(arguments)
    assert len(example.fetch(f"{PLANETS} WHERE id IN %s", [{1, 2}])) == 2


# ---------------------------------------------------------------- reading only


@pytest.mark.parametrize(
    "write",
    [
        "DELETE FROM planet",
        "INSERT INTO planet VALUES (9, 'Pluto')",
        "REPLACE INTO planet VALUES (1, 'x')",
        "TRUNCATE planet",
        "DROP TABLE planet",
        "ALTER TABLE planet ADD COLUMN x INT",
    ],
)
@pytest.mark.parametrize(
    "first",
    [
        "START TRANSACTION READ WRITE",
        "SET SESSION TRANSACTION READ WRITE",
        "a save",
        "a save that fails",
    ],
)
def test_fetch_cannot_write(example, cache, db, write, first):
    if first == "a save":
        example.save_planet(1, "Mercury")
    elif first == "a save that fails":
        with pytest.raises(pymysql.err.DataError):
            example.save_planet(1, "x" * 31)
    else:
        with pytest.raises(pymysql.Error, match="not a query"):
            example.fetch(first)
    cache.flushall()
    with pytest.raises(pymysql.Error, match="READ ONLY"):
        example.fetch(write)
    assert cache.keys() == []
    db.execute("SELECT name FROM planet")
    assert [name for (name,) in db.fetchall()][:2] == ["Mercury", "Venus"]


def test_a_query_that_fails_is_not_cached_and_its_error_stands_alone(example, cache):
    for _ in range(2):
        with pytest.raises(pymysql.err.ProgrammingError) as caught:
            example.fetch("SELECT * FROM nowhere")
        assert caught.value.__context__ is None
    assert cache.keys() == []
    assert example.planet(1) == MERCURY


# ---------------------------------------------------------------- threads and forks


def test_threads_get_their_own_rows(example, cache):
    def work(number):
        for turn in range(40):
            sql = f"SELECT {number} AS thread, {turn} AS turn, SLEEP(0.0005) AS slept"
            assert example.fetch(sql) == [{"thread": number, "turn": turn, "slept": 0}]
            id = 1 + (number + turn) % 8
            assert example.planet(id)["id"] == id
        return number

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(16))) == list(range(16))


FORK = """
import os, example

def connection(number):
    sql = "SELECT CONNECTION_ID() AS id, %s AS number"
    (row,) = example.fetch(sql, (number,))
    assert row["number"] == number
    return row["id"]

print(connection(0), flush=True)
children = []
for _ in range(3):
    children.append(os.fork())
    if children[-1] == 0:
        children.clear()
        break
ids = {connection(100 * os.getpid() + n) for n in range(20)}
assert len(ids) == 1
os.write(1, f"{ids.pop()}\\n".encode())  # as one piece
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_processes_that_fork_never_share_a_connection(redis_server, mysql_server):
    result = python("-c", FORK, **servers.environment(redis_server, mysql_server))
    assert (result.returncode, result.stderr) == (0, "")
    first, *others = result.stdout.split()
    assert len(others) == len(set(others)) == 4
    assert first in others  # the parent has kept its own


# ---------------------------------------------------------------- settings


def python(*arguments, **environment):
    """Run a new Python that can import the sample."""
    env = {**os.environ, "PYTHONPATH": str(PROJECT), **environment}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={name: value for name, value in env.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_import_is_silent_and_connects_to_nothing(cache, db):
    def connections():
        db.execute("SHOW GLOBAL STATUS LIKE 'Connections'")
        return db.fetchone(), cache.info("stats")["total_connections_received"]

    before = connections()
    result = python("-c", "from example import fetch, planet, save_planet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert connections() == before


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DB_HOST": None, "DB_PASS": None}, ["DB_HOST, DB_PASS"]),
        ({"REDIS_URL": None}, ["REDIS_URL"]),
        ({"DB_USER": ""}, ["DB_USER"]),
        ({"DB_PORT": "abc"}, ["DB_PORT", "'abc'"]),
        ({"DB_PORT": "99999"}, ["DB_PORT", "99999"]),
        ({"REDIS_URL": "nonsense"}, ["REDIS_URL", "redis://"]),
        ({"REDIS_URL": "redis://:geheim#niss@localhost:6379"}, ["REDIS_URL"]),
        ({"REDIS_URL": "redis://:geheim@localhost:6379?x=geheim"}, ["REDIS_URL"]),
        ({"REDIS_URL": "redis://localhost?socket_timeout=soon"}, ["REDIS_URL"]),
        ({"DB_SSL_CA": "/no/such/ca.pem"}, ["DB_SSL_CA", "/no/such/ca.pem"]),
        ({"DB_SSL_CA": __file__}, ["DB_SSL_CA", __file__]),
    ],
)
def test_a_setting_that_is_missing_or_malformed_is_named(environment, words):
    script = python(SCRIPT, **environment)
    module = python("-c", "import example", **environment)
    assert (script.returncode, script.stdout) == (1, "")
    assert len(script.stderr.splitlines()) == 1
    assert "ValueError: " in module.stderr.splitlines()[-1]
    for word in words:
        assert word in script.stderr
        assert word in module.stderr.splitlines()[-1]
    assert "geheim" not in script.stderr + module.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DB_PORT": "1"}, ["Can't connect", "refused", "DB_HOST"]),
        ({"DB_PASS": "geheim"}, ["Access denied", "variables"]),
        ({"DB_HOST": "no.such.host.invalid"}, ["no.such.host.invalid", "DB_HOST"]),
    ],
)
def test_a_database_out_of_reach_is_one_line(cache, environment, words):
    result = python(SCRIPT, **environment)
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert "geheim" not in result.stderr


def test_a_password_can_contain_any_character(db, cache):
    secret = "p€ß %/:#@?'\"\\ "
    db.execute("CREATE USER odd@'%%' IDENTIFIED BY %s", (secret,))
    try:
        db.execute("GRANT SELECT ON tutorial.* TO odd@'%'")
        assert load(DB_USER="odd", DB_PASS=secret).planet(1) == MERCURY
    finally:
        db.execute("DROP USER odd@'%'")


# ---------------------------------------------------------------- script and seed


def test_the_script_shows_each_technique_as_miss_and_as_hit(cache, mysql_server):
    first, second = python(SCRIPT), python(SCRIPT)
    assert (first.returncode, first.stderr) == (0, "")
    calls = ["fetch('SELECT * FROM planet')", "planet(1)", "planet(2)", "planet(3)"]
    lines = first.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == calls + calls
    for number, result in enumerate((first.stdout, second.stdout)):
        words = [word for word in result.split() if word in ("hit:", "MySQL,")]
        misses = 4 * ["MySQL,"] if number == 0 else 4 * ["hit:"]
        assert words == misses + 4 * ["hit:"]
    assert "{'id': 8, 'name': 'Neptune'}]" in first.stdout


def test_the_script_tells_the_truth_without_redis(cache):
    result = python(SCRIPT, REDIS_URL="redis://:geheim@localhost:1")
    assert result.returncode == 0
    assert result.stdout.count("MySQL,") == 8
    assert "hit" not in result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert "geheim" not in result.stderr


def test_hits_and_misses_can_be_logged(example, cache, caplog):
    caplog.set_level("DEBUG", example.__name__)
    example.planet(1), example.planet(1)
    words = [record.getMessage().split(",")[0] for record in caplog.records]
    assert words == ["MySQL", "hit: planet:1"]


def test_the_seed_can_run_again_and_loses_nothing(example, db, mysql_server, cache):
    db.execute("INSERT INTO planet VALUES (9, 'Pluto')")
    db.execute("UPDATE planet SET name = 'Gaia' WHERE id = 3")
    mysql_server.client(PROJECT / "seed.sql")
    rows = example.fetch(PLANETS)
    assert [row["id"] for row in rows] == list(range(1, 10))
    assert (rows[2]["name"], rows[8]["name"]) == ("Gaia", "Pluto")


def test_the_seed_is_utf8_on_a_server_that_is_not(new_servers, cache):
    server = new_servers.mysql("--character-set-server=latin1")
    server.client(PROJECT / "seed.sql")
    module = load(DB_PORT=str(server.port), DB_PASS=server.password)
    assert module.save_planet(9, "\U0001fa90 冥王星")["name"] == "\U0001fa90 冥王星"
    cache.delete("planet:9")
    assert module.planet(9) == {"id": 9, "name": "\U0001fa90 冥王星"}
