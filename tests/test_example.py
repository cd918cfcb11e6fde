"""What the sample returns and what it keeps in Redis while nothing fails."""

import os
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, time, timedelta
from decimal import Decimal

import pymysql
import pytest
from conftest import PROJECT, load
from tools import MERCURY, selects, wait_until

PLANETS = "SELECT * FROM planet"

# MySQL type, {value as SQL: value as PyMySQL returns it}
TYPES = [
    ("TINYINT", {"-128": -128}),
    ("BIGINT UNSIGNED", {"18446744073709551615": 2**64 - 1}),
    ("DECIMAL(10,2)", {"1.5": Decimal("1.50"), "-0.10": Decimal("-0.10")}),
    ("DECIMAL(20,18)", {"0.000000000000000001": Decimal("1E-18")}),
    ("FLOAT", {"1.1": 1.1}),
    ("DOUBLE", {"1e-300": 1e-300}),
    ("CHAR(4)", {"'a b'": "a b", "''": "", "'null'": "null"}),
    ("VARCHAR(9)", {"'\U0001f30d \\\\ \\\" \\n'": '\U0001f30d \\ " \n'}),
    (
        "TEXT",
        {'\'{"type":"Decimal","value":"1.5"}\'': '{"type":"Decimal","value":"1.5"}'},
    ),
    ("LONGTEXT", {"REPEAT('x', 100000)": "x" * 100000}),
    ("BINARY(4)", {"X'00FF80'": b"\x00\xff\x80\x00"}),
    ("VARBINARY(9)", {"''": b""}),
    ("BLOB", {"X'C328'": b"\xc3\x28"}),
    ("BIT(10)", {"b'1'": b"\x00\x01", "b'1000000001'": b"\x02\x01"}),
    ("DATE", {"'2019-07-25'": date(2019, 7, 25)}),
    ("DATE", {"'1000-01-01'": date(1000, 1, 1), "'2019-00-10'": "2019-00-10"}),
    ("DATETIME", {"'2019-07-25'": datetime(2019, 7, 25), "0": "0000-00-00 00:00:00"}),
    ("DATETIME(6)", {"20190725010203.000004": datetime(2019, 7, 25, 1, 2, 3, 4)}),
    ("TIMESTAMP NULL", {"'2019-07-25 01:02:03'": datetime(2019, 7, 25, 1, 2, 3)}),
    ("TIME", {"'-0:30'": -timedelta(minutes=30), "'838:0'": timedelta(hours=838)}),
    ("TIME(6)", {"'-01:00:00.000001'": timedelta(hours=-1, microseconds=-1)}),
    ("YEAR", {"2019": 2019}),
    ("ENUM('a','b')", {"'b'": "b"}),
    ("SET('a','b')", {"'a,b'": "a,b"}),
    ("JSON", {'\'["Decimal", "1.5"]\'': '["Decimal", "1.5"]'}),
    ("POINT", {"POINT(1, 2)": bytes(4) + struct.pack("<BIdd", 1, 1, 1, 2)}),
]


# ---- A hit equals the miss


def exact(rows):
    """The rows with their types: 1 == True == Decimal(1), but not as text."""
    return [{name: repr(value) for name, value in row.items()} for row in rows]


def check_hits(example, db, sql):
    """Return the rows of a miss. Hits, of fetch and of record, must equal them."""
    before = selects(db)
    miss, hit = [example.fetch(sql) for _ in "12"]
    records = [example.record("row", f"{sql} LIMIT 1") for _ in "12"]
    assert selects(db) == before + 2
    assert exact(hit) == exact(miss)
    assert exact(records) == 2 * exact(miss[:1])
    return miss


@pytest.mark.parametrize(("type", "values"), TYPES)
def test_a_hit_equals_the_miss_for_every_type(type, values, example, cache, db):
    db.execute("SET sql_mode = ''")
    db.execute(f"CREATE TABLE thing (value {type}, optional {type})")
    for sql in values:
        db.execute(f"INSERT INTO thing VALUES ({sql}, {sql}), ({sql}, NULL)")
    rows = check_hits(example, db, "SELECT * FROM thing")
    pairs = [(value, other) for value in values.values() for other in (value, None)]
    assert exact(rows) == exact([dict(zip(rows[0], pair)) for pair in pairs])


@pytest.mark.parametrize("columns", ["'' absent", "'1' `Decimal`", "1 a, 2 a"])
def test_no_name_of_a_column_is_special(columns, example, cache, db):
    check_hits(example, db, f"SELECT {columns}")


def test_no_rows_and_no_record_are_results_too(example, cache, db):
    before = selects(db)
    assert [example.fetch(f"{PLANETS} WHERE id > 100") for _ in "12"] == [[], []]
    assert [example.planet(99) for _ in "12"] == [None, None]
    assert selects(db) == before + 2


# ---- Keys and values in Redis


def test_fetch_keeps_a_string_under_the_text_of_the_query(example, cache):
    sql = f"{PLANETS} WHERE id < 3"
    assert example.fetch(sql) == [MERCURY, {"id": 2, "name": "Venus"}]
    assert cache.keys() == [sql.encode()]
    assert cache.get(sql) == b'[["id","name"],[[1,2],["Mercury","Venus"]]]'
    assert 0 < cache.pttl(sql) <= 10_000


def test_the_type_of_a_column_is_stored_once_or_for_each_value(example):
    text = example.rows_to_json([{"a": Decimal("1.5")}, {"a": None}])
    assert text == '[["a"],[{"type":"Decimal","values":["1.5",null]}]]'
    text = example.rows_to_json([{"a": Decimal("1.5")}, {"a": "x"}])
    assert text == '[["a"],[[{"type":"Decimal","value":"1.5"},"x"]]]'
    assert example.rows_to_json([{"a": None}]) == '[["a"],[[null]]]'


def test_planet_keeps_a_hash_under_its_id(example, cache):
    assert example.planet(1) == MERCURY
    assert cache.hgetall("planet:1") == {b"id": b"1", b"name": b'"Mercury"'}
    assert 0 < cache.pttl("planet:1") <= 10_000


@pytest.mark.parametrize("ttl", ["60", 60.5])
def test_the_ttl_is_read_at_each_call_and_no_key_is_without(ttl, example, cache):
    example.TTL = ttl
    example.fetch(PLANETS), example.planet(1), example.planet(99)
    assert [10 < cache.ttl(key) <= 60 for key in cache.scan_iter()] == 3 * [True]
    example.fetch("SELECT 1", ttl=100.5), example.record("one", "SELECT 1", ttl=100)
    assert 60 < cache.ttl("SELECT 1") <= cache.ttl("one") + 1 <= 101
    for refused in 0, 0.5, 2**31, 10**18:
        with pytest.raises(ValueError, match="seconds"):
            example.record("row", "SELECT 1", ttl=refused)


def test_a_hit_comes_from_redis_until_the_ttl_is_over(example, cache, db):
    def earth():
        return example.planet(3)["name"], example.fetch(PLANETS)[2]["name"]

    assert earth() == ("Earth", "Earth")
    db.execute("UPDATE planet SET name = 'Gaia' WHERE id = 3")
    assert earth() == ("Earth", "Earth")
    cache.delete("planet:3", PLANETS)  # as Redis does after the TTL
    assert earth() == ("Gaia", "Gaia")


def test_the_fields_of_an_older_record_do_not_remain(example, cache):
    cache.hset("thing", mapping={"a": "no JSON", "b": "2"})
    assert [example.record("thing", "SELECT 1 a") for _ in "12"] == 2 * [{"a": 1}]


@pytest.mark.parametrize("id", [1, "1", " 1 ", "001", Decimal(1)])
def test_an_id_is_a_whole_number_or_text_of_one(id, example, cache, db):
    assert example.planet(id) == MERCURY
    assert cache.keys() == [b"planet:1"]
    assert example.save_planet(id, "New") == {"id": 1, "name": "New"}


@pytest.mark.parametrize("id", [1.5, 1.0, "1abc", None, "", "1.0", b"1", [1], True])
def test_any_other_id_reaches_neither_server(id, cache):
    module = load(DB_PORT="1")  # a query would raise pymysql.OperationalError
    with pytest.raises((ValueError, TypeError)):
        module.planet(id)
    with pytest.raises((ValueError, TypeError)):
        module.save_planet(id, "Vulcan")
    assert cache.keys() == []


def test_a_key_whose_lock_would_be_on_another_node_is_refused(cache):
    module = load(DB_PORT="1")  # a query would raise pymysql.OperationalError
    with pytest.raises(ValueError, match="must not contain"):
        module.record("customer:}", PLANETS)
    module.paused_until = float("inf")  # then it would not be locked
    with pytest.raises(ValueError, match="must not contain"):
        module.record("customer:}", PLANETS)
    with pytest.raises(ValueError, match="must not contain"):
        load(REDIS_URL="redis://localhost:1").invalidate("customer:}")
    assert cache.keys() == []


def test_arguments_are_escaped_and_part_of_the_key(example, cache):
    sql = "SELECT name FROM planet WHERE id = %s OR name = %s"
    assert example.fetch(sql, (1, "' OR 1=1 -- ")) == [{"name": "Mercury"}]
    assert example.fetch(sql, (2, "x")) == [{"name": "Venus"}]
    assert [key.startswith(sql.encode()) for key in cache.scan_iter()] == 2 * [True]
    assert example.fetch("SELECT %(name)s AS x", {"name": "y"}) == [{"x": "y"}]
    assert example.fetch_key("}") != example.fetch_key(r"\x7d")


def test_a_mistake_in_the_arguments_does_not_replace_the_client(example, cache):
    client = example.redis_client()
    for sql, args in ("SELECT %s", ["\ud800"]), ("SELECT %(a)s", {}):
        with pytest.raises((ValueError, LookupError)):
            example.fetch(sql, args)
    assert example.redis_client() is client


def test_arguments_of_other_types_are_other_arguments(example, cache):
    arguments = 1, "1", Decimal("1.0"), b"1", None, date(2019, 7, 25), time(1, 2)
    results = [example.fetch("SELECT %s AS x", [x])[0]["x"] for x in arguments]
    assert results == [1, "1", Decimal("1.0"), b"1", None, "2019-07-25", "01:02:00"]


# ---- Queries in MySQL


@pytest.mark.parametrize("begin", ["START", "SET SESSION"])
@pytest.mark.parametrize("write", ["DELETE FROM planet", "DROP TABLE planet"])
def test_fetch_cannot_write(write, begin, example, cache, db):
    connections = db.execute("SHOW PROCESSLIST")
    with pytest.raises(pymysql.ProgrammingError, match="not a query"):
        example.fetch(f"{begin} TRANSACTION READ WRITE")
    # These are on the connection that fetch uses next.
    example.save_planet(1, "Mercury")
    example.write("SET @x = 1"), example.write("BEGIN")
    with pytest.raises(pymysql.Error, match="READ ONLY") as kept:
        example.fetch(write)
    wait_until(lambda: kept and db.execute("SHOW PROCESSLIST") <= connections)
    assert not cache.exists(write)
    assert example.fetch(PLANETS)[0] == MERCURY


@pytest.mark.parametrize("setting", ["autocommit = 0", "completion_type = 1"])
def test_no_transaction_stays_open_however_the_server_is_set(setting, example, db):
    def names():
        return example.query("SELECT name FROM planet WHERE id < 3")

    db.execute(f"SET GLOBAL {setting}")
    try:
        example.write("UPDATE planet SET name = 'New' WHERE id = 1")
    finally:
        db.execute(f"SET GLOBAL {setting.split()[0]} = DEFAULT")
    assert names() == [{"name": "New"}, {"name": "Venus"}]
    db.execute("UPDATE planet SET name = 'Newer' WHERE id < 3")
    assert names() == [{"name": "Newer"}, {"name": "Newer"}]


INTERRUPTED_QUERIES = """
import faulthandler, itertools, sys, example

def query(number):
    # As if somebody pressed Ctrl-C before this line of Python code.
    lines = itertools.count(1)

    def interrupt(frame, event, _):
        if event == "line" and next(lines) == number:
            raise KeyboardInterrupt
        return interrupt

    sys.settrace(interrupt)
    try:
        return example.query("SELECT 1 AS x")
    except KeyboardInterrupt:
        return None
    finally:
        sys.settrace(None)

faulthandler.dump_traceback_later(30, exit=True)  # if a query hangs
example.query("SELECT 1")  # then Python has imported all that it needs
results = map(query, itertools.count(1))
print(next(results), next(filter(None, results)), example.connection_slots.qsize() > 15)
"""


def test_interrupted_queries_do_not_block_later_ones(db):
    # On standard error, PyMySQL complains of its half-made objects.
    assert python("-c", INTERRUPTED_QUERIES).stdout == "None [{'x': 1}] True\n"


def test_threads_get_their_own_rows(example, cache):
    def work(number):
        for turn in range(40):
            sql = f"SELECT {number} AS thread, {turn} AS turn, SLEEP(0.0005) AS slept"
            assert example.fetch(sql) == [{"thread": number, "turn": turn, "slept": 0}]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))  # raises what a thread has raised


FORK = """
import os, example

def connections(count):
    start = 1000 * os.getpid()  # so that each query is a miss
    queries = [f"SELECT CONNECTION_ID() AS id, {start + n}" for n in range(count)]
    return {example.fetch(sql)[0]["id"] for sql in queries}

before = connections(1)
child = os.fork()
after = connections(20)
if child:
    assert os.waitpid(child, 0)[1] == 0
print(len(after), after == before)
"""


def test_processes_that_fork_never_share_a_connection(cache):
    result = python("-c", FORK)
    # The child has its own connection, and the parent has kept its own.
    assert (result.stdout, result.stderr) == ("1 False\n1 True\n", "")


FORK_DURING_A_QUERY = """
import os, example

for _ in range(example.MAX_CONNECTIONS - 1):
    example.connection_slots.get()
with example.mysql_connection():  # as another thread of the parent would
    child = os.fork()
    if not child:
        print(example.query("SELECT 1 AS x"), flush=True)
        os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_child_need_not_wait_for_connections_that_its_parent_uses(cache):
    result = python("-c", FORK_DURING_A_QUERY)
    assert (result.stdout, result.stderr) == ("[{'x': 1}]\n", "")


FORK_DURING_A_CALL = """
import faulthandler, gc, os, sys, threading, warnings, example

held, done = threading.Event(), threading.Event()

def hold():  # Each call of another thread does this for a moment.
    with example.redis_client().connection_pool._lock:
        held.set()
        done.wait()

def use_a_new_client():
    example.redis_client.cache_clear()
    gc.collect()
    print(example.planet(1), flush=True)

use_a_new_client()
use_a_new_client()  # redis-py never closes the first one.
threading.Thread(target=hold).start()
held.wait()
warnings.simplefilter("ignore")  # Python 3.12 warns of such a fork
child = os.fork()
if not child:
    faulthandler.dump_traceback_later(5, exit=True)  # if it hangs
    print(example.planet(1), flush=True)
    use_a_new_client()
    sys.exit()
done.set()
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_child_does_not_wait_for_a_lock_that_its_parent_had(cache):
    result = python("-c", FORK_DURING_A_CALL)
    assert (result.stdout, result.stderr) == (4 * f"{MERCURY}\n", "")


# ---- Settings, script and seed


def python(*arguments, status=0, **environment):
    """Run a new Python that can import the sample. None unsets a variable."""
    env = {**os.environ, **environment}
    result = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=PROJECT,
        env={name: value for name, value in env.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == status, result.stderr
    assert "geheim" not in result.stdout + result.stderr
    return result


def error_line(**environment):
    """The one line that the script prints if it cannot work."""
    result = python("example.py", status=1, **environment)
    (line,) = (result.stdout + result.stderr).splitlines()
    return line


def test_an_import_is_silent_and_connects_to_nothing(cache, db):
    def connections():
        db.execute("SHOW GLOBAL STATUS LIKE 'Connections'")
        return db.fetchone(), cache.info("stats")["total_connections_received"]

    before = connections()
    result = python("-c", "from example import fetch, planet, save_planet")
    assert (result.stdout, result.stderr) == ("", "")
    assert connections() == before


@pytest.mark.parametrize(
    ("pattern", "environment"),
    [
        ("REDIS_URL, DB_HOST$", {"REDIS_URL": None, "DB_HOST": ""}),
        ("DB_PORT.*'abc'", {"DB_PORT": "abc"}),
        ("DB_PORT.*99999", {"DB_PORT": "99999"}),
        ("REDIS_URL.*redis://", {"REDIS_URL": "nonsense"}),
        ("REDIS_URL", {"REDIS_URL": "redis://:geheim#niss@localhost:6379"}),
        ("REDIS_URL", {"REDIS_URL": "redis://:geheim@localhost:6379?x=geheim"}),
        ("REDIS_URL", {"REDIS_URL": "redis://user:12345/geheim@localhost:6379"}),
        ("DB_SSL_CA.*/no/such/ca.pem", {"DB_SSL_CA": "/no/such/ca.pem"}),
        (f"DB_SSL_CA.*{__file__}", {"DB_SSL_CA": __file__}),
    ],
)
def test_a_setting_that_is_missing_or_malformed_is_named(pattern, environment):
    line = error_line(**environment)
    assert re.search(pattern, line)
    module = python("-c", "import example", status=1, **environment)
    assert line.startswith("ValueError: ")
    assert module.stderr.endswith(f"\n{line}\n")


def test_a_database_out_of_reach_is_one_line(cache):
    assert re.search("refused.*DB_", error_line(DB_PORT="1"))
    assert re.search("Access denied.*DB_", error_line(DB_PASS="geheim"))
    assert re.search("no.host.*DB_", error_line(DB_HOST="no.host.invalid"))


def test_a_password_can_contain_any_character(db, cache):
    load(DB_PASS="\udcff")  # os.environ has this for a byte that is not UTF-8
    secret = "p€ß %/:#@?'\"\\ "
    db.execute("CREATE USER odd@'%%' IDENTIFIED BY %s", (secret,))
    db.execute("GRANT SELECT ON tutorial.* TO odd@'%'")
    assert load(DB_USER="odd", DB_PASS=secret).planet(1) == MERCURY


def test_the_script_shows_each_technique_as_miss_and_as_hit(cache):
    calls = 2 * ["fetch('SELECT SLEEP(0.05)')"] + 2 * ["planet(1)"]
    for words in 2 * ["MySQL:", "hit:"], 4 * ["hit:"]:
        result = python("example.py")
        shown = re.findall(r"^\S.*", result.stdout, re.MULTILINE)
        assert shown == calls
        assert re.findall("MySQL:|hit:", result.stdout) == words
        assert result.stdout.count(f": {MERCURY}\n") == 2
        assert result.stderr == ""


def test_the_time_limit_of_mysql_can_be_a_fraction_of_a_second(cache, tmp_path):
    program = (PROJECT / "example.py").read_text(encoding="utf-8")
    changed = program.replace("\nMYSQL_TIMEOUT = 5 ", "\nMYSQL_TIMEOUT = 2.5 ")
    assert changed != program
    (tmp_path / "example.py").write_text(changed, encoding="utf-8")
    assert str(MERCURY) in python(tmp_path / "example.py").stdout


def test_the_seed_can_run_again_and_loses_nothing(example, db, mysql_server, cache):
    db.execute("INSERT INTO planet VALUES (9, 'Pluto')")
    db.execute("UPDATE planet SET name = 'Gaia' WHERE id = 3")
    before = example.fetch(PLANETS)
    mysql_server.client(PROJECT / "seed.sql")
    cache.flushall()
    assert example.fetch(PLANETS) == before
