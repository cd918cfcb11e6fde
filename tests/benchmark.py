"""Measure what the cache is worth.

    tests/local python tests/benchmark.py

It uses the servers named in the environment, where it creates a database with a random
name and a few keys, and removes only those. The part ttl is a simulation, and eviction
starts Redis servers of its own.
"""

import argparse
import contextlib
import inspect
import json
import os
import pickle
import platform
import random
import secrets
import signal
import sys
import threading
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from types import SimpleNamespace

import pymysql
import redis
from servers import Servers
from tools import PROJECT, Sent, Worker, outcomes, plain, start_crowd

sys.path.append(str(PROJECT))
import example

SIZES = {  # (in full, with --quick)
    "visits": (2**17, 2**10),  # rows of the table that the costly query reads
    "rows": (10_000, 200),  # of the long result
    "short": (3_000, 20),  # runs of a call that takes less than a millisecond
    "long": (30, 4),  # runs of a call that takes longer
    "runs": (3, 1),  # runs of a measurement that takes seconds
    "callers": ((1, 10, 100), (1, 4)),  # threads of one process
    "threads": (200, 5),  # in each of four processes
    "ttl_keys": (3_000, 300),
    "ttl_reads": (400, 100),  # per simulated second
    "ttl_seconds": (2_100, 900),
    "eviction_keys": (10_000, 1_000),
    "eviction_reads": (10_000, 500),  # in each of three phases
}
TTLS = [1, 2, 5, 10, 30, 60, 120, 300]  # seconds
POLICIES = ["volatile-lru", "volatile-ttl", "volatile-lfu"]
POLICIES += ["allkeys-lru", "allkeys-lfu", "noeviction"]

COSTLY_CHART = """\
    title "A costly query"
    x-axis ["no cache: {0:.2f} ms", "miss: {1:.2f} ms", "hit: {2:.2f} ms"]
    y-axis "milliseconds" 0 --> {top:.0f}
    bar [{0:.2f}, {1:.2f}, {2:.2f}]"""
TTL_CHART = """\
    title "Hits (bars) and stale results (line)"
    x-axis "TTL in seconds" {TTLS}
    y-axis "% of all reads" 0 --> 100
    bar {hits}
    line {stale}"""


# ---- Measuring and printing


def compare(ways, runs, before_a_miss=None):
    """Return the median milliseconds of each of ways, {name: function}.

    The ways take turns in random order, so that a slow moment slows all of them.
    """
    times = {name: [] for name in ways}
    for function in ways.values():
        function()  # the first call also connects
    for _ in range(runs):
        for name in random.sample(list(ways), len(ways)):
            if name == "miss":
                before_a_miss()
            start = time.perf_counter()
            ways[name]()
            times[name].append(1000 * (time.perf_counter() - start))
    return [median(values) for values in times.values()]


def show(columns, rows):
    """Print a Markdown table. columns: {name: format of its cells}"""
    table = [[*map(format, row, columns.values())] for row in rows]
    first, *others = (max(map(len, column)) for column in zip(columns, *table))
    line = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    for name, *cells in [columns, line, *table]:
        print("|", " | ".join([name.ljust(first), *map(str.rjust, cells, others)]), "|")


# ---- A database and keys that only the benchmark uses

Case = namedtuple("Case", "name key sql call runs")


@contextlib.contextmanager
def own_database(bench):
    """Let the sample use a new database. At the end, remove it and all keys."""
    bench.cache = example.redis_client()
    # A client that neither decodes nor has the time limits of the sample.
    bench.plain_cache = redis.Redis.from_url(os.environ["REDIS_URL"])
    bench.name = f"cache_aside_benchmark_{secrets.token_hex(8)}"
    bench.id = random.randrange(2**31, 2**32 - 8)  # of planets that nobody else caches
    bench.cases = list_cases(bench)
    bench.keys = [case.key for case in bench.cases]
    # Connections that can write, without the time limits of the sample.
    login = {**example.MYSQL_OPTIONS, "database": None, "init_command": None}
    login.update(read_timeout=None, write_timeout=None)
    bench.login, example.MYSQL_OPTIONS["database"] = login, bench.name
    example.idle_connections.clear()
    example.TTL = 60  # no key expires between a miss and its hits
    try:
        with pymysql.connect(**login) as bench.db:
            fill(bench)
            server = bench.cache.info("server")["redis_version"]
            mysql = query(bench.db, "SELECT VERSION() AS version")[0]["version"]
            print(f"Redis server {server}, MySQL server {mysql}")
            yield
    finally:
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)  # another Ctrl-C must not stop this
        # A new connection: the first Ctrl-C may have cut off a reply on the old one.
        with pymysql.connect(**login) as db:
            query(db, f"DROP DATABASE IF EXISTS {bench.name}")
        for key in bench.keys:
            example.invalidate(key)
        # The garbage collector may warn of a socket that it has to close.
        for client in bench.cache, bench.plain_cache:
            client.close()


def list_cases(bench):
    """Return the results that are measured, from one row to a costly query."""
    key, planet, fetch = f"planet:{bench.id}", example.planet, example.fetch
    one = f"SELECT id, name FROM {bench.name}.planet WHERE id = {bench.id}"
    short = f"SELECT * FROM {bench.name}.planet"
    long = f"SELECT * FROM {bench.name}.visit ORDER BY id LIMIT {bench.rows}"
    costly = "SELECT planet, COUNT(*), SUM(price) "
    costly += f"FROM {bench.name}.visit GROUP BY planet"
    return [
        Case("1 row by its key", key, one, partial(planet, bench.id), bench.short),
        Case("8 rows", short, short, partial(fetch, short), bench.short),
        Case(f"{bench.rows:,} rows", long, long, partial(fetch, long), bench.long),
        Case("costly query", costly, costly, partial(fetch, costly), bench.long),
    ]


def query(db, sql):
    """Return the rows as a program without a cache does: one round trip to MySQL."""
    with db.cursor() as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall())


def fill(bench):
    run = partial(query, bench.db)
    run(f"CREATE DATABASE {bench.name} CHARACTER SET utf8mb4")
    bench.db.select_db(bench.name)
    columns = "planet TINYINT, price DECIMAL(10, 2), at DATETIME, note VARCHAR(60)"
    run(f"CREATE TABLE visit (id INT UNSIGNED PRIMARY KEY, {columns})")
    run("INSERT INTO visit VALUES (0, 0, 9.99, '2019-11-01', 'the first visit')")
    count = 1
    while count < bench.visits:  # each statement doubles the table
        run(f"""INSERT INTO visit SELECT id, id MOD 8, id / 100,
            TIMESTAMP('2019-11-01') + INTERVAL id MINUTE,
            CONCAT('visit number ', id, ' to this planet')
            FROM (SELECT id + {count} AS id FROM visit) AS more""")
        count *= 2
    run("CREATE TABLE planet (id INT UNSIGNED PRIMARY KEY, name VARCHAR(30))")
    planets = f"SELECT {bench.id} + id, CONCAT('Planet ', id) FROM visit WHERE id < 8"
    run(f"INSERT INTO planet {planets}")
    run("ANALYZE TABLE planet, visit")


# ---- The parts. Each prints its docstring, with the sizes filled in, and a table.


def empty(bench):
    """A query without a cache, on a miss and on a hit

    Medians of {short:,} runs, of the last two of {long}.
    Pays from: the share of hits from which the cache makes the mean call faster.
    The costly query is a GROUP BY over {visits:,} rows.
    """
    rows = []
    for case in bench.cases:
        without = partial(query, bench.db, case.sql)
        ways = {"no cache": without, "miss": case.call, "hit": case.call}
        forget = partial(bench.cache.delete, case.key)
        mysql, miss, hit = times = compare(ways, case.runs, forget)
        # It pays if rate * hit + (1 - rate) * miss < mysql; from over 100 %: never.
        pays = max(0, miss - mysql) / (miss - hit)
        rows.append([case.name, *times, mysql / hit, pays])
    columns = {"": "", "no cache, ms": ".3f", "miss, ms": ".3f", "hit, ms": ".3f"}
    show({**columns, "speed-up": ".1f", "pays from": ".1%"}, rows)
    return COSTLY_CHART.format(*times, top=1 + max(times))


def limit(bench):
    """How close a hit is to what is possible

    hgetall and json.loads(get) read the same rows with the same client.
    pickle: pickle.loads(get) of the same rows, as django-redis does.
    Speed: the other's time / the time of a hit; 0.91 is 1.10 times the time, 0.95 1.05.
    """
    one, short, long, _ = bench.cases
    cache, plain_cache = bench.cache, bench.plain_cache
    json_key, pickle_key = f"{bench.name}:json", f"{bench.name}:pickle"
    bench.keys += json_key, pickle_key
    cache.setex(json_key, 600, json.dumps(short.call()))
    plain_cache.setex(pickle_key, 600, pickle.dumps(long.call()))
    rows = []
    for case, name, other, bound in (
        (one, "hgetall", lambda: cache.hgetall(one.key), 1 / 1.10),
        (short, "json.loads(get)", lambda: json.loads(cache.get(json_key)), 1 / 1.05),
        (long, "PyMySQL", lambda: query(bench.db, long.sql), 6),
        (long, "pickle", lambda: pickle.loads(plain_cache.get(pickle_key)), 0.75),
    ):
        times = compare({"other": other, "hit": case.call}, case.runs)
        rows.append([case.name, name, *times, times[0] / times[1], bound])
    columns = {"": "", "other": "", "other, ms": ".3f", "hit, ms": ".3f"}
    show({**columns, "speed": ".2f", "at least": ".2f"}, rows)


def wire(bench):
    """The commands that one call sends to Redis, and the bytes that Redis keeps

    Commands by MONITOR, bytes by MEMORY USAGE.
    """
    rows = []
    for case in bench.cases[:3]:
        case.call()  # also connects
        bench.cache.delete(case.key)
        with Sent(bench.plain_cache) as miss:
            case.call()
        with Sent(bench.plain_cache) as hit:
            case.call()
        commands = [" ".join(sent.commands) for sent in (hit, miss)]
        rows.append([case.name, *commands, bench.cache.memory_usage(case.key)])
    show({"": "", "hit": "", "miss": "", "bytes": ","}, rows)


def crowd(bench):
    """Many callers miss the same costly query at the same moment

    Medians of {runs} runs. The last row is four processes of {threads} threads and a
    query that takes 200 ms (bound: 1 query, and 1,200 ms on two cores).
    All others are threads of one process, and the query is the GROUP BY.
    """
    # UUID() is new in each query: the callers get as many UUIDs as there were queries.
    costly = bench.cases[3].sql.replace("SELECT", "SELECT UUID() AS run,")
    slow = f"SELECT UUID() AS run, SLEEP(0.2) FROM {bench.name}.planet LIMIT 1"
    plain_key = f"{bench.name}:plain"
    bench.keys += costly, slow, plain_key
    plain_cache, connections, rows = bench.plain_cache, [], []

    def get_and_setex(db):
        if text := plain_cache.get(plain_key):
            return json.loads(text)
        result = query(db, costly)
        plain_cache.setex(plain_key, 60, json.dumps(result, default=str))
        return result

    def in_threads(call, callers):
        barrier = threading.Barrier(callers, timeout=60)

        def caller(db):
            barrier.wait()
            start = time.perf_counter()
            return {"answer": call(db), "seconds": time.perf_counter() - start}

        with ThreadPoolExecutor(callers) as pool:
            return list(pool.map(caller, connections[:callers]))

    def in_processes():
        start_crowd(workers, "fetch", slow, threads=bench.threads)
        return outcomes(workers)

    def measure(name, key, callers, crowd, *args):
        found = []
        for _ in range(1 + bench.runs):
            plain_cache.delete(key)
            results = crowd(*args)
            answers = [result["answer"] for result in results if "answer" in result]
            queries = len({answer[0]["run"] for answer in answers})
            slowest = max(result["seconds"] for result in results)
            found.append([queries, len(results) - len(answers), 1000 * slowest])
        # The first run also connects.
        rows.append([callers, name, *map(median, zip(*found[1:]))])

    with contextlib.ExitStack() as stack:
        for _ in range(max(bench.callers)):
            connections.append(stack.enter_context(pymysql.connect(**bench.login)))
        for n in bench.callers:
            measure("fetch", costly, n, in_threads, lambda _: example.fetch(costly), n)
            measure("GET and SETEX", plain_key, n, in_threads, get_and_setex, n)
        environment = {**os.environ, "DB_NAME": bench.name}
        workers = [stack.enter_context(Worker(environment)) for _ in range(4)]
        measure("fetch, 200 ms", slow, 4 * bench.threads, in_processes)
    columns = {"callers": "", "by": "", "queries": "", "callers with an error": ""}
    show({**columns, "slowest waits, ms": ",.0f"}, rows)


def zipf(keys):
    """Return weights for random.choices: the n-th key is read 1/n as often as the first."""
    return [1 / rank for rank in range(1, keys + 1)]


def simulate(ttl, keys, per_second, seconds):
    """Return the percentages of hits and of stale results, the first 300 s not counted."""
    same, weights = random.Random(1), zipf(keys)  # the same reads for each TTL
    versions, expires, cached = Counter(), Counter(), {}
    hits = stale = counted = 0
    for n, key in enumerate(same.choices(range(keys), weights, k=per_second * seconds)):
        if n % 1000 == 0:
            versions.update(same.choices(range(keys), weights))  # an update
        second = n / per_second
        hit = second < expires[key]
        if not hit:
            expires[key], cached[key] = second + ttl, versions[key]
        if second >= 300:
            counted += 1
            hits += hit
            stale += cached[key] != versions[key]
    return 100 * hits / counted, 100 * stale / counted


def ttl(bench):
    """Hits and stale results by TTL, simulated

    {ttl_reads} reads per second of {ttl_keys:,} keys by Zipf's law; for each 1,000 reads
    one update by the same law, without invalidation. {ttl_seconds:,} seconds, which are
    counted and not slept. The first 300 only fill the cache.
    """
    size = bench.ttl_keys, bench.ttl_reads, bench.ttl_seconds
    hits, stale = zip(*(simulate(seconds, *size) for seconds in TTLS))
    queries = [bench.ttl_reads * (1 - percent / 100) for percent in hits]
    columns = {"TTL, s": "", "hits, %": ".1f", "stale results, %": ".1f"}
    show({**columns, "queries per second": ".1f"}, zip(TTLS, hits, stale, queries))
    hits, stale = ([round(number, 1) for number in column] for column in (hits, stale))
    return TTL_CHART.format(TTLS=TTLS, hits=hits, stale=stale)


def eviction(bench):
    """Hits by eviction policy, with a Redis that is too small

    Memory for about a fifth of {eviction_keys:,} keys. {eviction_reads:,} reads by
    Zipf's law fill it, as many are counted, and as many are counted with news: every 50
    reads the least wanted key becomes the most wanted.
    All keys have the same TTL, so volatile-ttl evicts the oldest.
    """
    count, reads, value = bench.eviction_keys, bench.eviction_reads, "x" * 500
    hits = Counter()
    with Servers() as servers, contextlib.ExitStack() as stack:
        with plain(servers.redis()) as cache:
            cache.setex("key:1", 600, value)
            memory = cache.info("memory")["used_memory"]
            memory += count // 5 * cache.memory_usage("key:1")
        limit = "--maxmemory", memory, "--maxmemory-policy"
        caches = {}
        for policy in POLICIES:
            client = plain(servers.redis(*limit, policy))
            caches[policy] = stack.enter_context(client)
        for n, rank in enumerate(
            random.choices(range(count), zipf(count), k=3 * reads)
        ):
            phase = n // reads
            news = max(0, n - 2 * reads) // 50
            for policy, cache in caches.items():
                key = f"key:{(rank - news) % count}"
                if cache.get(key):
                    hits[policy, phase] += 1
                    continue
                with contextlib.suppress(redis.OutOfMemoryError):
                    cache.setex(key, 600, value)
    rows = [[name, hits[name, 1] / reads, hits[name, 2] / reads] for name in POLICIES]
    show({"maxmemory-policy": "", "hits": ".1%", "hits with news": ".1%"}, rows)


# GitHub's own are too pale in the light scheme.
COLOURS = '%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#3b82f6, #f59e0b"}}}}%%'
PARTS = {part.__name__: part for part in (empty, limit, wire, crowd, ttl, eviction)}


def main():
    parser = argparse.ArgumentParser(description="Measure what the cache is worth.")
    every = ",".join(PARTS)
    parser.add_argument("--only", metavar="PART,...", default=every, help=every)
    parser.add_argument("--quick", action="store_true", help="small, meaningless sizes")
    args = parser.parse_args()
    parts = [PARTS[name] for name in args.only.split(",")]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    sizes = {name: SIZES[name][args.quick] for name in SIZES}
    bench, charts = SimpleNamespace(**sizes), []
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}")
    with own_database(bench):
        for part in parts:
            print(f"\n## {inspect.getdoc(part).format(**sizes)}\n", flush=True)
            charts.append(part(bench))
            if example.warned_at:
                sys.exit("benchmark.py: Redis failed, so these numbers are wrong")
    for chart in filter(None, charts):
        print(f"\n```mermaid\n{COLOURS}\nxychart-beta\n{chart}\n```")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (KeyError, pymysql.Error, redis.RedisError) as error:
        sys.exit(f"benchmark.py: {error!r}; check REDIS_URL, DB_* and --only")
