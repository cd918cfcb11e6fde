"""What the sample promises while nothing fails."""

import datetime
import os
import subprocess
import sys
import threading
from decimal import Decimal

import pymysql
import pytest
from conftest import PROJECT, load
from tools import selects

PLANETS = "SELECT * FROM planet"

# MySQL type, the value as SQL, the value as PyMySQL gives it
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
    ("LONGBLOB", "'text'", b"text"),
    ("BIT(1)", "b'1'", b"\x01"),
    ("BIT(10)", "b'1000000001'", b"\x02\x01"),
    ("DATE", "'2019-07-25'", datetime.date(2019, 7, 25)),
    ("DATE", "'0000-00-00'", "0000-00-00"),
    ("DATE", "'2019-00-10'", "2019-00-10"),
    ("DATETIME", "'0000-00-00 00:00:00'", "0000-00-00 00:00:00"),
    ("DATETIME", "'2019-07-25 00:00:00'", datetime.datetime(2019, 7, 25)),
    (
        "DATETIME(6)",
        "'2019-07-25 01:02:03.000004'",
        datetime.datetime(2019, 7, 25, 1, 2, 3, 4),
    ),
    (
        "TIMESTAMP NULL",
        "'2019-07-25 01:02:03'",
        datetime.datetime(2019, 7, 25, 1, 2, 3),
    ),
    ("TIME", "'-00:30:00'", -datetime.timedelta(minutes=30)),
    ("TIME", "'838:59:59'", datetime.timedelta(hours=838, minutes=59, seconds=59)),
    ("TIME(6)", "'-01:00:00.000001'", -datetime.timedelta(hours=1, microseconds=1)),
    ("YEAR", "2019", 2019),
    ("ENUM('a','b')", "'b'", "b"),
    ("SET('a','b')", "'a,b'", "a,b"),
    ("JSON", '\'["Decimal", "1.5"]\'', '["Decimal", "1.5"]'),
    ("POINT", "POINT(1, 2)", None),
]


@pytest.fixture
def asked(db):
    """How many SELECTs MySQL has answered since the last call."""

    seen = selects(db)

    def since():
        nonlocal seen
        before, seen = seen, selects(db)
        return seen - before

    return since


def shape(value):
    """The value with the types in it: 1 == True == Decimal(1), but not here."""
    if isinstance(value, (list, tuple)):
        return type(value), [shape(item) for item in value]
    if isinstance(value, dict):
        return type(value), [(name, shape(item)) for name, item in value.items()]
    return type(value), repr(value)


@pytest.mark.parametrize(("type", "sql", "expected"), TYPES)
def test_a_hit_equals_the_miss_for_every_type(
    example, cache, db, asked, type, sql, expected
):
    db.execute("SET sql_mode = ''")
    db.execute(f"CREATE TABLE thing (value {type}, nothing {type})")
    db.execute(f"INSERT INTO thing VALUES ({sql}, NULL), (NULL, NULL), ({sql}, NULL)")
    asked()
    miss, hit = (
        example.fetch("SELECT * FROM thing"),
        example.fetch("SELECT * FROM thing"),
    )
    assert asked() == 1
    assert shape(hit) == shape(miss)
    assert len(miss) == 3
    if expected is not None:
        assert shape(miss[0]["value"]) == shape(expected)
    assert miss[1] == {"value": None, "nothing": None}


@pytest.mark.parametrize(("type", "sql", "expected"), TYPES)
def test_a_hit_equals_the_miss_for_every_type_in_a_hash(
    example, cache, db, asked, type, sql, expected
):
    db.execute("SET sql_mode = ''")
    db.execute("ALTER TABLE planet DROP COLUMN name")
    db.execute(f"ALTER TABLE planet ADD COLUMN name {type}")
    db.execute(f"UPDATE planet SET name = {sql} WHERE id = 1")
    asked()
    miss, hit = example.planet(1), example.planet(1)
    assert asked() == 1
    assert shape(hit) == shape(miss)
    if expected is not None:
        assert shape(miss) == shape({"id": 1, "name": expected})


@pytest.mark.parametrize(
    "columns",
    [
        "'1.5' AS `Decimal`",
        "'1.5' AS `Decimal`, 'x' AS `columns`, '[]' AS `rows`",
        "1 AS `rows`",
        "'Decimal' AS x, 'bytes' AS y, 'columns' AS z",
        "'[1]' AS `bytes`, NULL AS `datetime`, '' AS ``",
        "'absent' AS `absent`",
        "1 AS `same`, 2 AS `same`",
    ],
)
def test_names_of_columns_are_never_taken_for_marks(example, cache, asked, columns):
    sql = f"SELECT {columns}"
    if "``" in columns:
        sql = sql.replace("AS ``", "AS ` x`")
    miss, hit = example.fetch(sql), example.fetch(sql)
    assert asked() == 1
    assert shape(hit) == shape(miss)


def test_no_rows_are_an_answer(example, cache, asked):
    sql = "SELECT * FROM planet WHERE id > 100"
    assert [example.fetch(sql) for _ in range(3)] == [[], [], []]
    assert asked() == 1


def test_fetch_caches_under_the_text_of_the_query_for_ttl_seconds(example, cache):
    rows = example.fetch(PLANETS)
    assert rows[0] == {"id": 1, "name": "Mercury"}
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert cache.keys() == [PLANETS.encode()]
    assert cache.type(PLANETS) == b"string"
    assert 0 < cache.pttl(PLANETS) <= 10_000


def test_planet_caches_a_hash_for_ttl_seconds(example, cache):
    assert example.planet(1) == {"id": 1, "name": "Mercury"}
    assert cache.keys() == [b"planet:1"]
    assert set(cache.hgetall("planet:1")) == {b"id", b"name"}
    assert 0 < cache.pttl("planet:1") <= 10_000


def test_a_hit_comes_from_redis(example, cache, asked):
    cache.setex(PLANETS, 10, '[1,["id","name"],[[9],["Pluto"]]]')
    cache.hset("planet:9", mapping={"id": "9", "name": '"Pluto"'})
    assert example.fetch(PLANETS) == [{"id": 9, "name": "Pluto"}]
    assert example.planet(9) == {"id": 9, "name": "Pluto"}
    assert asked() == 0


def test_the_ttl_is_read_at_each_call(example, cache):
    example.TTL = 60
    example.fetch(PLANETS), example.planet(1)
    assert 10 < cache.ttl(PLANETS) <= 60
    assert 10 < cache.ttl("planet:1") <= 60


@pytest.mark.parametrize("ttl", [2.5, "3"])
def test_a_ttl_that_redis_refuses_leaves_no_key_for_ever(example, cache, ttl):
    example.TTL = ttl
    example.fetch(PLANETS), example.planet(1), example.planet(99)
    assert all(0 < cache.pttl(key) <= 3000 for key in cache.scan_iter())
    assert len(cache.keys()) == 3


def test_the_database_is_asked_again_after_the_ttl(example, cache, db):
    assert example.planet(3)["name"] == "Earth"
    assert example.fetch(PLANETS)[2]["name"] == "Earth"
    db.execute("UPDATE planet SET name = 'Gaia' WHERE id = 3")
    assert example.planet(3)["name"] == "Earth"
    cache.delete("planet:3", PLANETS)  # as Redis does when the TTL is over
    assert example.planet(3)["name"] == "Gaia"
    assert example.fetch(PLANETS)[2]["name"] == "Gaia"


def test_an_absent_record_is_remembered(example, cache, asked):
    assert {example.planet(99) for _ in range(20)} == {None}
    assert asked() == 1
    assert 0 < cache.pttl("planet:99") <= 10_000


@pytest.mark.parametrize("id", [1, "1", " 1 ", "001", Decimal(1)])
def test_an_id_is_a_whole_number_or_text_of_one(example, cache, id):
    assert example.planet(id) == {"id": 1, "name": "Mercury"}
    assert cache.keys() == [b"planet:1"]


@pytest.mark.parametrize(
    "id", [1.5, 1.0, "1abc", "1 OR 1=1", None, "", "1.0", b"1", [1], True, "0x1"]
)
def test_any_other_id_reaches_neither_server(example, cache, asked, id):
    with pytest.raises((ValueError, TypeError)):
        example.planet(id)
    with pytest.raises((ValueError, TypeError)):
        example.save_planet(id, "Vulcan")
    assert cache.keys() == []
    assert asked() == 0


def test_arguments_are_escaped_and_part_of_the_key(example, cache, db):
    sql = "SELECT name FROM planet WHERE id = %s OR name = %s"
    assert example.fetch(sql, (1, "' OR 1=1 -- ")) == [{"name": "Mercury"}]
    assert example.fetch(sql, (2, "x")) == [{"name": "Venus"}]
    assert example.fetch(sql, (1, "' OR 1=1 -- ")) == [{"name": "Mercury"}]
    assert all(key.startswith(sql.encode()) for key in cache.scan_iter())
    assert len(cache.keys()) == 2
    by_name = "SELECT id FROM planet WHERE name = %(name)s"
    assert example.fetch(by_name, {"name": "Mars"}) == [{"id": 4}]


def test_arguments_of_other_types_are_other_arguments(example, cache):
    answers = [
        example.fetch("SELECT %s AS x", [x])[0]["x"]
        for x in (1, "1", Decimal("1.0"), b"1", None, datetime.date(2019, 7, 25))
    ]
    assert answers == [1, "1", Decimal("1.0"), b"1", None, "2019-07-25"]
    assert len(cache.keys()) == len(answers)


@pytest.mark.parametrize(
    "way_around",
    [None, "START TRANSACTION READ WRITE", "SET SESSION TRANSACTION READ WRITE"],
)
@pytest.mark.parametrize(
    "write",
    [
        "DELETE FROM planet",
        "UPDATE planet SET name = 'x'",
        "INSERT INTO planet VALUES (9, 'Pluto')",
        "REPLACE INTO planet VALUES (1, 'x')",
        "TRUNCATE planet",
        "DROP TABLE planet",
        "CREATE TABLE other (id INT)",
        "ALTER TABLE planet ADD COLUMN x INT",
    ],
)
def test_fetch_cannot_write(example, cache, db, write, way_around):
    if way_around:
        with pytest.raises(pymysql.Error, match="returns no rows"):
            example.fetch(way_around)
    with pytest.raises(pymysql.Error, match="READ ONLY"):
        example.fetch(write)
    assert not [key for key in cache.scan_iter() if not key.startswith(b"lock:")]
    db.execute("SELECT name FROM planet")
    assert [name for (name,) in db.fetchall()][:2] == ["Mercury", "Venus"]


def test_what_fails_is_not_cached(example, cache):
    for _ in range(2):
        with pytest.raises(pymysql.err.ProgrammingError):
            example.fetch("SELECT * FROM nowhere")
    assert cache.get("SELECT * FROM nowhere") is None
    assert example.planet(1)["name"] == "Mercury"


def test_threads_get_their_own_rows(example, cache):
    wrong, done = [], []

    def work(number):
        for turn in range(40):
            sql = f"SELECT {number} AS thread, {turn} AS turn, SLEEP(0.0005) AS slept"
            if example.fetch(sql) != [{"thread": number, "turn": turn, "slept": 0}]:
                wrong.append(sql)
            if example.planet(1 + (number + turn) % 8)["id"] != 1 + (number + turn) % 8:
                wrong.append(turn)
        done.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(done) == 16
    assert wrong == []


def python(*arguments, **environment):
    """A new Python with the sample in reach, as on anybody's machine."""
    env = {**os.environ, "PYTHONPATH": str(PROJECT), **environment}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={name: value for name, value in env.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


EXAMPLE = str(PROJECT / "example.py")


def test_an_import_is_silent_and_talks_to_nobody(cache, db):
    db.execute("SHOW GLOBAL STATUS LIKE 'Connections'")
    mysql = db.fetchone()
    redis = cache.info("stats")["total_connections_received"]
    result = python("-c", "from example import fetch, planet, save_planet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    db.execute("SHOW GLOBAL STATUS LIKE 'Connections'")
    assert db.fetchone() == mysql
    assert cache.info("stats")["total_connections_received"] == redis


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
    ],
)
def test_a_setting_that_cannot_be_used_is_named(environment, words):
    script, module = (
        python(EXAMPLE, **environment),
        python("-c", "import example", **environment),
    )
    assert script.returncode == 1
    assert script.stdout == ""
    assert len(script.stderr.splitlines()) == 1
    assert module.returncode == 1
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
        ({"DB_NAME": "nowhere"}, ["nowhere", "variables"]),
        ({"DB_HOST": "no.such.host.invalid"}, ["no.such.host.invalid", "DB_HOST"]),
    ],
)
def test_a_database_out_of_reach_is_one_line(cache, environment, words):
    result = python(EXAMPLE, **environment)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert "geheim" not in result.stderr


def test_passwords_may_hold_any_character(redis_server, mysql_server, db, cache):
    secret = "p€ß %/:#@?'\"\\ "
    db.execute("CREATE USER odd@'%%' IDENTIFIED BY %s", (secret,))
    try:
        db.execute("GRANT SELECT ON tutorial.* TO odd@'%'")
        module = load(DB_USER="odd", DB_PASS=secret)
        assert module.planet(1) == {"id": 1, "name": "Mercury"}
    finally:
        db.execute("DROP USER odd@'%'")


def test_the_script_shows_each_technique_as_miss_and_as_hit(cache, mysql_server):
    first, second = python(EXAMPLE), python(EXAMPLE)
    assert (first.returncode, first.stderr) == (0, "")
    calls = ["fetch('SELECT * FROM planet')", "planet(1)", "planet(2)", "planet(3)"]
    lines = [line for line in first.stdout.splitlines() if not line.startswith(" ")]
    assert [line.split(":")[0] for line in lines] == calls + calls
    assert ["miss, from MySQL" in line for line in lines] == 4 * [True] + 4 * [False]
    assert ["hit, from Redis" in line for line in lines] == 4 * [False] + 4 * [True]
    assert all(line.endswith(" ms") for line in lines)
    assert "{'id': 8, 'name': 'Neptune'}]" in first.stdout
    assert second.stdout.count("hit, from Redis") == 8
    assert "miss" not in second.stdout


def test_the_script_tells_the_truth_without_redis(cache):
    result = python(EXAMPLE, REDIS_URL="redis://:geheim@localhost:1")
    assert result.returncode == 0
    assert result.stdout.count("miss, from MySQL") == 8
    assert len(result.stderr.splitlines()) == 1
    assert "geheim" not in result.stderr


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
    environment = {"DB_PORT": str(server.port), "DB_PASS": server.password}
    module = load(**environment)
    module.save_planet(9, "\U0001fa90 冥王星")
    cache.delete("planet:9")
    assert module.planet(9) == {"id": 9, "name": "\U0001fa90 冥王星"}
    assert module.fetch("SELECT MAX(id) AS last FROM planet") == [{"last": 9}]
    columns = module.fetch("SHOW FULL COLUMNS FROM planet")
    assert [column["Type"] for column in columns][1].lower() == "varchar(30)"


def test_an_error_of_mysql_is_shown_alone(example):
    with pytest.raises(pymysql.err.ProgrammingError) as caught:
        example.fetch("SELECT * FROM nowhere")
    assert caught.value.__context__ is None
