"""What the cache is worth: empty, full, in a crowd, by TTL and by eviction policy.

    tests/local python tests/benchmark.py
    tests/local python tests/benchmark.py --only crowd,ttl --json results.json

Parts empty, limit and crowd use the servers named in the environment, wherever they
are. They create a database with a random name and a few keys, and remove just these.
Part ttl is a simulation; part eviction starts Redis servers of its own.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import secrets
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pymysql
import redis
from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from servers import ServerError, Servers

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where example.py is

SIZES = {  # how many; how many with --quick
    "visits": (400_000, 2_000),  # rows of the table under the costly query
    "rows": (10_000, 200),  # rows of the long result
    "short": (1_000, 20),  # runs of what takes less than a millisecond
    "long": (20, 4),  # runs of what takes a tenth of a second
    "runs": (3, 2),  # of what takes seconds
    "callers": ((1, 10, 100), (1, 4)),  # at once
    "ttl_keys": (3_000, 300),
    "ttl_reads": (400, 100),  # a second, of simulated time
    "keys": (20_000, 1_000),  # under eviction; five times what the memory holds
    "reads": (6_000, 500),  # in each run, under eviction
}
KEEP = 60  # seconds; no key may expire between a miss and the hit that is measured
TTLS = 1, 2, 5, 10, 30, 60, 120, 300  # seconds
WARM_UP = 300  # seconds of simulated time; twice as many are then measured
READS_PER_UPDATE = 1_000
READS_PER_NEWS = 50
VALUE = "x" * 500  # under eviction
POLICIES = ["volatile-lru", "volatile-ttl", "volatile-lfu"]
POLICIES += ["allkeys-lru", "allkeys-lfu", "noeviction"]

selects = []  # every SELECT that this process sends to MySQL, whoever sends it


def stop(problem):
    sys.exit(f"benchmark.py: {problem}")


# ---- Measuring and showing


def compare(ways, runs, track, before=None):
    """How long the calls take, {way: numbers}, of ways {way: call}.

    One call of each way in turn, in an order that changes: what slows the machine down
    for a while then slows down all of them. What comes before a call is not timed.
    """
    times = {way: [] for way in ways}
    at_once = max(1, runs // 20)  # the progress is drawn only twenty times
    for _ in track(range(runs // at_once)):
        for _ in range(at_once):
            for way in random.sample(list(ways), len(ways)):
                if before and way in before:
                    before[way]()
                start = time.perf_counter()
                ways[way]()
                times[way].append(1000 * (time.perf_counter() - start))
    return {way: summary(times[way]) for way in ways}


def summary(times):
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    numbers = {"runs": len(times), "median_ms": statistics.median(times)}
    return {**numbers, "quartiles_ms": (cuts[24], cuts[74]), "p99_ms": cuts[98]}


def spread(values):
    median = statistics.median(values)
    return {"median": median, "farthest": max(abs(value - median) for value in values)}


def text(found, digits):
    return f"{found['median']:,.{digits}f} ± {found['farthest']:,.{digits}f}"


def bar(value, longest, width=16):
    return Bar(longest or 1, 0, value, width=width)


def table(title, columns, rows):
    """A table; a column of numbers has > before its name. None is an empty row."""
    look = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD}
    made = Table(title=title, **look, pad_edge=False)
    for name in columns:
        right = name.startswith(">")
        made.add_column(name.lstrip(">"), justify="right" if right else "left")
    for row in rows:
        made.add_row(*row or [])
    return made


def time_table(title, comparisons, unit):
    """A table of what compare() found; unit is the way that counts as 1."""
    rows = []
    for name, found in comparisons.items():
        slowest = max(numbers["median_ms"] for numbers in found.values())
        for way, numbers in found.items():
            median, p99, runs = numbers["median_ms"], numbers["p99_ms"], numbers["runs"]
            share = median / found[unit]["median_ms"]
            shown = f"{median:.3f}", f"{p99:.3f}", f"{share:.3f}", bar(median, slowest)
            rows.append((name, way, *shown, f"{runs:,}"))
            name = ""
        rows.append(None)
    columns = "", "", ">median, ms", ">99 % below, ms", f">of {unit}", "", ">runs"
    return table(title, columns, rows[:-1])


# ---- The bench: a database and keys of its own on the servers in the environment


def ask(db, sql, args=None):
    """The rows, as a program without a cache asks for them."""
    with db.cursor() as cursor:
        cursor.execute(sql, args)
        return list(cursor.fetchall())


def fill(db, visits, first_id):
    ask(db, "CREATE TABLE planet (id INT UNSIGNED PRIMARY KEY, name VARCHAR(30))")
    names = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus"]
    for id, name in enumerate([*names, "Neptune"], first_id):
        ask(db, "INSERT INTO planet VALUES (%s, %s)", (id, name))
    columns = "planet TINYINT, price DECIMAL(10, 2), at DATETIME, note VARCHAR(60)"
    ask(db, f"CREATE TABLE visit (id INT UNSIGNED PRIMARY KEY, {columns})")
    ask(db, "INSERT INTO visit VALUES (0, 0, 9.99, '2019-11-01', 'the first visit')")
    count = 1
    while count < visits:  # each statement doubles the table
        double = f"""INSERT INTO visit SELECT id + {count},
            CRC32(id + {count}) MOD 8, CRC32(id + {count}) MOD 1000000 / 100,
            at + INTERVAL CRC32(id + {count}) MOD 10000000 SECOND,
            CONCAT('visit number ', id + {count}, ' to this planet')
            FROM visit ORDER BY id LIMIT {visits - count}"""
        ask(db, double)
        count = min(2 * count, visits)
    ask(db, "ANALYZE TABLE planet, visit")


@contextlib.contextmanager
def bench(size):
    """The sample at work on a database that is gone afterwards, as its keys are."""
    try:
        import example
    except ValueError as error:
        stop(error)
    name = f"cache_aside_benchmark_{secrets.token_hex(8)}"
    # A connection that may write, and take its time over it.
    login = {**example.DATABASE, "database": None, "init_command": None}
    login.update(read_timeout=None, write_timeout=None)
    example.DATABASE["database"], example.TTL = name, KEEP
    keys = []

    def remove_database():
        # A new connection: Ctrl-C may have cut off a reply on the old one.
        with contextlib.closing(pymysql.connect(**login)) as db:
            ask(db, f"DROP DATABASE IF EXISTS `{name}`")

    def remove_keys():
        example.connect.cache_clear()
        for key in keys:  # one by one: in a cluster they are in different places
            example.connect().delete(key)
            example.connect().delete(f"lock:{key}")

    with contextlib.ExitStack() as stack:
        try:
            cache = example.connect()
            db = stack.enter_context(contextlib.closing(pymysql.connect(**login)))
            stack.callback(remove_database)
            stack.callback(remove_keys)
            # Another Ctrl-C must not keep us from that.
            for number in signal.SIGTERM, signal.SIGINT:
                stack.callback(signal.signal, number, signal.SIG_IGN)
            ask(db, f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4")
        except redis.RedisError as error:
            stop(f"Redis: {error}; check REDIS_URL")
        except pymysql.Error as error:
            stack.pop_all()  # there is nothing to remove
            denied = error.args[0] in (1044, 1142, 1227)
            hint = "it takes the right to CREATE and DROP a database of its own"
            stop(f"MySQL: {error.args[-1]}; {hint if denied else 'check DB_*'}")
        # Ids that nobody uses: nobody's planet may be replaced in the cache.
        while cache.exists(f"planet:{(id := random.randrange(2**31, 2**32 - 8))}"):
            pass
        made = SimpleNamespace(sample=example, cache=cache, db=db, id=id)
        made.login, made.plain = {**login, "database": name}, f"{name}:plain"
        made.cases = cases(made, name, size)
        keys += [made.plain, *(case.key for case in made.cases)]
        db.select_db(name)
        fill(db, size.visits, id)
        count_selects()
        yield made


def cases(made, name, size):
    """What is asked for, and the ways to it."""

    def rows(name, sql, runs):
        direct, cached = lambda: ask(made.db, sql), lambda: made.sample.fetch(sql)
        bare = lambda: json.loads(made.cache.get(made.plain))
        ways = {"direct": direct, "cached": cached, "bare": bare}
        command = "GET", made.plain
        return SimpleNamespace(name=name, key=sql, runs=runs, command=command, **ways)

    one = f"SELECT * FROM {name}.planet WHERE id = {made.id}"
    by_id = rows("1 row by its key", one, size.short)
    by_id.key = f"planet:{made.id}"
    by_id.command = "HGETALL", by_id.key
    by_id.cached = lambda: made.sample.planet(made.id)
    by_id.bare = lambda: made.cache.hgetall(by_id.key)
    long = f"SELECT * FROM {name}.visit ORDER BY id LIMIT {size.rows}"
    costly = f"SELECT planet, COUNT(*), SUM(price) FROM {name}.visit GROUP BY planet"
    return (
        by_id,
        rows("8 rows", f"SELECT * FROM {name}.planet", size.short),
        rows(f"{size.rows:,} rows", long, size.long),
        rows("costly query", costly, size.long),
    )


def count_selects():
    send = pymysql.connections.Connection.query

    def counted(connection, sql, *args, **options):
        if sql.startswith("SELECT"):
            selects.append(sql)
        return send(connection, sql, *args, **options)

    pymysql.connections.Connection.query = counted


def expect_selects(before, expected):
    # When the cache fails, MySQL answers: that would be no hit.
    sent = len(selects) - before
    if sent != expected:
        stop(f"MySQL was asked {sent} times, not {expected}: is Redis well?")


# ---- Part 1: empty against full


def empty(size, track, made):
    """One query after the other: without a cache, with an empty one, with a full one."""
    found, results, notes = {}, [], []
    for case in made.cases:
        case.direct(), case.cached()  # the first time only, some things are slow
        ways = {"no cache": case.direct, "miss": case.cached, "hit": case.cached}
        forget = {"miss": lambda case=case: made.cache.delete(case.key)}
        sent = len(selects)
        found[case.name] = numbers = compare(ways, case.runs, track, forget)
        expect_selects(sent, 2 * numbers["hit"]["runs"])
        db, miss, hit = (numbers[way]["median_ms"] for way in ways)
        # It pays if rate * hit + (1 - rate) * miss < db.
        pays = max(0, miss - db) / (miss - hit) if hit < db else None
        verdict = "never pays" if pays is None else f"pays from {pays:.1%} hits"
        notes.append(f"{case.name}: {db / hit:.1f} x as fast; the cache {verdict}.")
        rates = {"hit_times_as_fast": db / hit, "pays_from_hit_rate": pays}
        results.append({"query": case.name, **numbers, **rates})
    notes.append(f"The costly query is a GROUP BY over {size.visits:,} rows.")
    return results, [time_table("Empty cache, full cache", found, "no cache"), *notes]


# ---- Part 2: how close to the limit


def node(cache, key):
    """The client of the one server that holds the key."""
    if isinstance(cache, redis.RedisCluster):
        return cache.get_redis_connection(cache.get_node_from_key(key))
    return cache


@contextlib.contextmanager
def raw(server, *command):
    """A call that sends a command over a bare socket and takes the reply as it comes."""
    connection = server.connection_pool.get_connection()
    try:
        sock = connection._sock  # connected, and logged in, by redis-py
        sent, pong = b"".join(connection.pack_command(*command)), b"+PONG\r\n"
        sock.sendall(sent + b"PING\r\n")  # its reply shows where the other one ends
        reply = b""
        while not reply.endswith(pong):
            reply += sock.recv(2**20)

        def call():
            sock.sendall(sent)
            missing = len(reply) - len(pong)
            while missing:
                missing -= len(sock.recv(missing))

        yield call
    finally:
        connection.disconnect()
        server.connection_pool.release(connection)


def traffic(server, call, before=lambda: None):
    """The commands and bytes of one call, by the server's own counters."""

    def counters():
        totals, commands = server.info("stats"), server.info("commandstats")
        counts = {name[8:].upper(): of["calls"] for name, of in commands.items()}
        counts["sent_bytes"] = totals["total_net_input_bytes"]
        counts["received_bytes"] = totals["total_net_output_bytes"]
        return collections.Counter(counts)

    def spent(call):
        # Others may use the server, too. The least of several has none of theirs.
        counts = []
        for _ in range(10):
            before()
            start = counters()
            call()
            counts.append(counters() - start)
        return min(
            counts, key=lambda count: count["sent_bytes"] + count["received_bytes"]
        )

    return spent(call) - spent(lambda: None)  # less what the counters themselves cost


def limit(size, track, made):
    """A hit beside the same rows by redis-py alone, and by nothing but a socket."""
    times, wire, rows, notes = {}, [], [], []
    for case in made.cases[:3]:
        name, answer, server = case.name, case.cached(), node(made.cache, case.key)
        plain = json.dumps(answer, default=str)
        made.cache.setex(made.plain, 10 * KEEP, plain)
        with raw(node(made.cache, case.command[1]), *case.command) as raw_call:
            ways = {"raw socket": raw_call, "redis-py": case.bare, "hit": case.cached}
            sent = len(selects)
            times[name] = compare(ways, case.runs, track)
            expect_selects(sent, 0)
        size_of = {}
        if case.command[0] == "GET":
            length = made.cache.strlen(case.key)
            size_of = {"stored_bytes": length, "json_bytes": len(plain)}
            notes.append(f"{name}: {length:,} bytes in Redis, {len(plain):,} as JSON.")
        forget = lambda case=case: made.cache.delete(case.key)
        hit, miss = traffic(server, case.cached), traffic(server, case.cached, forget)
        wire.append({"answer": name, "hit": hit, "miss": miss, **size_of})
        for kind, counts in ("hit", hit), ("miss", miss):
            total = f"{counts['sent_bytes']:,}", f"{counts['received_bytes']:,}"
            commands = " ".join(
                f"{n}x{command}" if n > 1 else command
                for command, n in counts.items()
                if command.isupper()
            )
            rows.append((name, kind, commands, *total))
    columns = "", "", "commands, those inside a script too", ">sent, bytes", ">received"
    shown = [time_table("How close to the limit", times, "redis-py")]
    shown += [
        "redis-py: client.hgetall(key); json.loads(client.get(key)), the same rows"
    ]
    shown += ["", table("One call on the wire to Redis", columns, rows), *notes]
    times = [{"answer": name, **numbers} for name, numbers in times.items()]
    return {"times": times, "wire": wire}, shown


# ---- Part 3: the crowd


def meet(call, callers):
    """All call at once; how many ms the last one waits."""
    go = threading.Event()

    def caller():
        go.wait()
        call()
        return time.perf_counter()

    with concurrent.futures.ThreadPoolExecutor(callers) as pool:
        try:
            waiting = [pool.submit(caller) for _ in range(callers)]
        finally:
            start = time.perf_counter()
            go.set()
        # Ctrl-C ends this wait only. The pool then waits until all have their answers,
        # or one might still store his after the keys have been deleted.
        concurrent.futures.wait(waiting)
    return 1000 * (max(future.result() for future in waiting) - start)


def crowd(size, track, made):
    """The costly query, cold: by the sample, and by GET and SETEX without any more."""
    # Without the sample's time limits, which such a program would not have.
    cache = type(made.cache).from_url(os.environ["REDIS_URL"], decode_responses=True)
    costly, results, rows = made.cases[-1], [], []

    def plain():
        if found := cache.get(made.plain):
            return json.loads(found)
        with contextlib.closing(pymysql.connect(**made.login)) as db:
            answer = ask(db, costly.key)
        cache.setex(made.plain, KEEP, json.dumps(answer, default=str))
        return answer

    ways = {"sample": (costly.key, costly.cached), "plain": (made.plain, plain)}
    for callers in size.callers:
        found = {way: [] for way in ways}
        for _ in track(range(size.runs)):
            for way, (key, call) in ways.items():
                cache.delete(key)
                sent = len(selects)
                slowest = meet(call, callers)
                found[way].append((len(selects) - sent, slowest))
        for way, runs in found.items():
            queries, slowest = map(spread, zip(*runs))
            numbers = {"queries": queries, "slowest_ms": slowest, "runs": len(runs)}
            results.append({"callers": callers, "way": way, **numbers})
            part = bar(queries["median"], max(size.callers))
            shown = text(queries, 0), part, text(slowest, 0), f"{len(runs)}"
            rows.append((str(callers), way, *shown))
    cache.close()
    columns = ">callers", "", ">queries", "", ">the slowest waits, ms", ">runs"
    return results, [table("A crowd meets a cold costly query", columns, rows)]


# ---- Part 4: time to live


def zipf(keys):
    """Cumulative weights: the second is wanted half as often as the first, and so on."""
    return list(itertools.accumulate(1 / rank for rank in range(1, keys + 1)))


def simulate(ttl, reads):
    """Percent of hits and of stale answers in [(second, key, its version), ...]."""
    expires, held = collections.defaultdict(int), {}
    hits = stale = measured = 0
    for second, key, version in reads:
        hit = second < expires[key]
        if not hit:
            expires[key], held[key] = second + ttl, version
        if second >= WARM_UP:
            measured += 1
            hits += hit
            stale += held[key] != version
    return 100 * hits / measured, 100 * stale / measured


def ttl(size, track):
    """Time is counted, not waited for: a second is so many reads."""
    keys, weights = range(size.ttl_keys), zipf(size.ttl_keys)
    found, results, rows = [], [], []
    for _ in track(range(size.runs)):
        count, versions, reads = 3 * WARM_UP * size.ttl_reads, collections.Counter(), []
        for n, key in enumerate(random.choices(keys, cum_weights=weights, k=count)):
            if n % READS_PER_UPDATE == 0:
                versions.update(random.choices(keys, cum_weights=weights))
            reads.append((n / size.ttl_reads, key, versions[key]))
        found.append([simulate(ttl, reads) for ttl in TTLS])
    for ttl, runs in zip(TTLS, zip(*found)):
        hits, stale = map(spread, zip(*runs))
        queries = size.ttl_reads * (1 - hits["median"] / 100)
        numbers = {"hits_percent": hits, "stale_percent": stale, "runs": len(runs)}
        results.append({"ttl_s": ttl, **numbers, "queries_per_s": queries})
        shown = text(hits, 1), bar(hits["median"], 100), f"{queries:.1f}"
        shown += text(stale, 2), bar(stale["median"], 100), f"{len(runs)}"
        rows.append((str(ttl), *shown))
    columns = ">TTL, s", ">hits, %", "", ">queries/s", ">stale answers, %", "", ">runs"
    note = (
        f"Simulated: {size.ttl_reads} reads/s of {size.ttl_keys:,} keys, wanted by Zipf's"
        f" law; {size.ttl_reads / READS_PER_UPDATE:.1f} updates/s by the same law,\nnot by"
        f" save_planet. {3 * WARM_UP} s are counted, not waited for, {WARM_UP} of them to"
        " warm up."
    )
    return results, [table("Time to live", columns, rows), note]


# ---- Part 5: eviction


def memory(cache):
    return cache.info("memory")["used_memory"]


def eviction(size, track):
    """The same reads from six servers in turn, all too small, each with its policy."""
    keys, weights, runs = range(size.keys), zipf(size.keys), size.runs
    found = {policy: collections.defaultdict(list) for policy in POLICIES}
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(Servers())

        def start(*args):
            server = servers.redis(*args)
            return server, stack.enter_context(redis.Redis.from_url(server.url))

        server, cache = start()
        unused = memory(cache)
        with cache.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.setex(f"key:{key}", 10 * KEEP, VALUE)
            pipe.execute()
        fifth = unused + (memory(cache) - unused) // 5
        server.kill()
        limit = "--maxmemory", fifth, "--maxmemory-policy"
        caches = {policy: start(*limit, policy)[1] for policy in POLICIES}

        news = 0
        for kind in track([*["fill"] * 2, *runs * ["steady"], *runs * ["news"]]):
            hits, refused = collections.Counter(), collections.Counter()
            for rank in random.choices(keys, cum_weights=weights, k=size.reads):
                news += kind == "news"
                key = f"key:{(rank - news // READS_PER_NEWS) % size.keys}"
                for policy, cache in caches.items():
                    if cache.get(key):
                        hits[policy] += 1
                        continue
                    try:
                        cache.setex(key, 10 * KEEP, VALUE)
                    except redis.OutOfMemoryError:
                        refused[policy] += 1
            for policy in POLICIES:
                found[policy][kind].append(100 * hits[policy] / size.reads)
                found[policy]["refused"].append(refused[policy])
        held = {policy: cache.dbsize() for policy, cache in caches.items()}
    results, rows = [], []
    for policy in POLICIES:
        steady, news = (spread(found[policy][kind]) for kind in ("steady", "news"))
        numbers = {"hits_percent": steady, "hits_with_news_percent": news, "runs": runs}
        refused = sum(found[policy]["refused"])
        numbers.update(keys_held=held[policy], writes_refused=refused)
        results.append({"policy": policy, **numbers})
        shown = text(steady, 1), bar(steady["median"], 100, 10), text(news, 1)
        shown += bar(news["median"], 100, 10), f"{held[policy]:,}", f"{refused:,}"
        rows.append((policy, *shown, f"{runs}"))
    columns = "", ">hits, %", "", ">with news, %", "", ">keys held", ">refused", ">runs"
    note = (
        f"{server.version} with memory for a fifth of {size.keys:,} keys; a run is"
        f" {size.reads:,} reads by Zipf's law.\nNews: every {READS_PER_NEWS} reads the key"
        " that was wanted least becomes the first.\nAll keys have the same TTL and none"
        " expires: volatile-ttl evicts what was stored first."
    )
    return results, [table("Eviction", columns, rows), note]


# ---- All of it

PARTS = {part.__name__: part for part in (empty, limit, crowd, ttl, eviction)}
ON_ENDPOINTS = {"empty", "limit", "crowd"}


def machine():
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux says it here only
        models = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
        name = models[0] if models else name
    return f"{os.cpu_count()} x {name}, {platform.system()} {platform.release()}"


def versions(made):
    found = [f"Python {platform.python_version()}"]
    for package in "redis", "hiredis", "PyMySQL":
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    if made:
        info = node(made.cache, "any").info("server")
        valkey, number = info.get("valkey_version"), info["redis_version"]
        found.append(f"Valkey server {valkey}" if valkey else f"Redis server {number}")
        version = ask(made.db, "SELECT VERSION() AS version")[0]["version"]
        product = "MariaDB" if "MariaDB" in version else "MySQL server"
        found.append(f"{product} {version.split('-')[0]}")
    return found


def arguments():
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=look)
    names = ", ".join(PARTS)
    help = f"only these parts, of {names}; can be repeated"
    parser.add_argument("--only", action="append", metavar="PART,...", help=help)
    help = "the numbers, for a machine"
    parser.add_argument("--json", type=Path, metavar="FILE", help=help)
    help = "small sizes, to see whether it works; the numbers mean nothing"
    parser.add_argument("--quick", action="store_true", help=help)
    args = parser.parse_args()
    args.only = ",".join(args.only or PARTS).split(",")
    if unknown := [part for part in args.only if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {names}")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"no such folder: {args.json.parent}")
    return args


def main():
    args, status, made = arguments(), 0, None
    # Terminated, it must put things in order as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    size = SimpleNamespace(**{name: SIZES[name][args.quick] for name in SIZES})
    sys.stdout.reconfigure(errors="replace")  # a terminal may have no bars
    # In a file or a pipe rich would fold the tables at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    aside = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        if ON_ENDPOINTS.intersection(args.only):
            made = stack.enter_context(bench(size))
        result = {"machine": machine(), "versions": versions(made), "quick": args.quick}
        console.print(f"{result['machine']}\n{', '.join(result['versions'])}")
        for name, part in PARTS.items():
            if name not in args.only:
                continue
            given = [made] if name in ON_ENDPOINTS else []
            # Drawn between two measurements: a thread that draws would disturb them.
            progress = Progress(console=aside, auto_refresh=False, transient=True)
            progress.disable = not aside.is_terminal
            track = functools.partial(progress.track, description=name)
            try:
                with progress:
                    result[name], shown = part(size, track, *given)
            except (ServerError, pymysql.Error, redis.RedisError) as error:
                status = f"benchmark.py: {name}: stopped: {error}"
                print(status, file=sys.stderr)
                continue
            console.print("", *shown, sep="\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(bool(status))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (pymysql.Error, redis.RedisError) as error:
        stop(error)
