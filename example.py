"""Cache-aside: Redis in front of MySQL.

What is found in the cache is a hit. On a miss one caller asks the database and stores
the answer for TTL seconds, and the others wait for it. While Redis fails, MySQL answers.
"""

import functools
import json
import logging
import os
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import date, datetime, timedelta
from decimal import Decimal

import pymysql
import redis
from pymysql.err import error_map
from redis.backoff import NoBackoff
from redis.exceptions import ClusterError, RedisClusterException, ResponseError
from redis.retry import Retry

TTL = 10  # seconds until the database is asked again
CACHE_TIMEOUT = 0.2  # seconds to wait for Redis; a hung one costs little more than this
REST = 5  # seconds to leave a failed Redis alone, or every call would wait for it
DB_TIMEOUT = 5  # seconds to connect to MySQL, and for each reply; then it is an error
LOCK = 9  # seconds until another caller asks, if the one who was asking has died
POLL = 0.05  # seconds between two looks while waiting

# ---- Settings


def unusable(problem):
    """One line for whoever runs the script, an exception for whoever imports it."""
    if __name__ == "__main__":
        sys.exit(f"example.py: {problem}")
    raise ValueError(problem) from None  # the error before it may quote the password


# Empty is missing, too: PyMySQL would take localhost for an empty DB_HOST.
needed = ("REDIS_URL", "DB_HOST", "DB_USER", "DB_PASS", "DB_NAME")
if missing := [name for name in needed if not os.environ.get(name)]:
    unusable(f"not set in the environment: {', '.join(missing)}")

CACHE = {
    "url": os.environ["REDIS_URL"],
    "decode_responses": True,
    "socket_timeout": CACHE_TIMEOUT,
    "socket_connect_timeout": CACHE_TIMEOUT,
    # Its default for a cluster, three retries with pauses, costs seconds a call.
    "retry": Retry(NoBackoff(), 0),
}
try:  # this talks to nobody, but refuses what is not a URL or not an option
    redis.Redis.from_url(**CACHE).connection_pool.make_connection()
except (TypeError, ValueError, redis.RedisError):
    unusable("REDIS_URL is not redis://[user:password@]host:port, percent-encoded")

port = os.environ.get("DB_PORT") or "3306"
if not (port.isdecimal() and 0 < int(port) < 65536):
    unusable(f"DB_PORT is not a port number: {port!r}")
DATABASE = {
    "host": os.environ["DB_HOST"],
    "port": int(port),
    "user": os.environ["DB_USER"],
    "password": os.environ["DB_PASS"].encode(),  # text would be sent as Latin-1
    "database": os.environ["DB_NAME"],
    "cursorclass": pymysql.cursors.DictCursor,
    "autocommit": True,  # or InnoDB repeats the connection's first snapshot for ever
    "init_command": "SET SESSION TRANSACTION READ ONLY",  # MySQL itself refuses writes
    "connect_timeout": DB_TIMEOUT,
    "read_timeout": DB_TIMEOUT,
    "write_timeout": DB_TIMEOUT,
}
if ca := os.environ.get("DB_SSL_CA"):
    if not os.path.isfile(ca):
        unusable(f"DB_SSL_CA is not a file: {ca!r}")
    # All three: with ssl_ca alone any certificate will do.
    DATABASE.update(ssl_ca=ca, ssl_verify_cert=True, ssl_verify_identity=True)

# ---- MySQL
local = threading.local()  # one connection per thread; shared, rows would be mixed up


def query(sql, args=None, write=False):
    """The rows as a list of dicts. A connection that MySQL has dropped is replaced."""
    local.asked = True
    db, pid = getattr(local, "connection", (None, None))
    local.connection = None, None  # after an error its state is unknown: not used again
    new = pid != os.getpid()  # also after a fork: parent and child would share it
    try:
        if new:
            db = pymysql.connect(**DATABASE)
        with db.cursor() as cursor:
            if write:
                cursor.execute("SET TRANSACTION READ WRITE")  # only the next one
            cursor.execute(sql, args)
            # After a START TRANSACTION READ WRITE, say, the next DELETE would pass.
            if not write and not cursor.description:
                raise pymysql.ProgrammingError(f"this returns no rows: {sql}")
            rows = list(cursor.fetchall())
    except pymysql.OperationalError as error:
        # PyMySQL has closed a connection that is lost. A slow query is not run twice.
        if new or db.open or "timed out" in str(error):
            raise
        return query(sql, args, write)
    local.connection = db, os.getpid()
    return rows


# ---- Redis
# Redis is out of reach, or the port is not that of a Redis.
AWAY = (ClusterError, RedisClusterException, redis.ConnectionError)
AWAY += (redis.InvalidResponse, redis.TimeoutError)
# What look raises: nothing there (TypeError, KeyError), or not written by this program.
MISS = ArithmeticError, LookupError, ResponseError, RuntimeError, TypeError, ValueError


@functools.cache  # of a client; a failure to make one is not remembered
def connect():
    """A client for the node in REDIS_URL, or for the cluster that it belongs to."""
    client = redis.Redis.from_url(**CACHE)
    if client.info("cluster").get("cluster_enabled"):
        client = redis.RedisCluster.from_url(**CACHE)
    return client


resting_until = 0  # time.monotonic() at which Redis may be tried again
warned = set()  # of which states, since Redis last worked


def cache_failed(error):
    """Leave Redis alone for a while if it is out of reach. Warn, once an outage."""
    global resting_until
    # One that is full or read-only refuses to write, and goes on serving hits.
    state = "away" if isinstance(error, AWAY) else "refuses"
    if state == "away":
        resting_until = time.monotonic() + REST
    if isinstance(error, redis.ReadOnlyError):
        connect.cache_clear()  # after a failover the name leads to another node
    if state not in warned:
        warned.add(state)
        reason = str(error).split("caused error: ")[-1]  # without the data of a command
        logging.getLogger(__name__).warning("cache not used: %s", reason)


# ---- Cache-aside


def cache_aside(key, look, ask, store):
    """The cached answer; on a miss the database's, stored for all who want it.

    look(cache) reads the answer from the cache or raises; ask() asks the database;
    store(pipe, answer) queues what one transaction writes under the key.
    """
    if time.monotonic() < resting_until:
        return ask()
    try:
        answer = look(connect())
        warned.discard("away")
        return answer
    except AWAY as error:
        cache_failed(error)
        return ask()
    except MISS:
        pass
    return fill(key, look, ask, store)


def fill(key, look, ask, store, renew=False):
    """Ask and store. One caller does; the others wait for that answer, or that error.

    renew: ask and store, whatever the cache holds and whoever else is asking.
    """
    answer = unknown = object()  # not None: that is the answer for an absent record
    mine, holder, token = False, None, uuid.uuid4().hex  # of the lock
    try:
        cache = connect()
        lock = cache.lock("lock:" + key, timeout=LOCK)
        # A second more than the lock lives, so that one gets it before all give up.
        patience = time.monotonic() + LOCK + 1
        if renew:
            cache.delete(key)  # a Redis that is full refuses the rest, but not this
        while not renew and time.monotonic() < patience:
            if error := holder and cache.get(f"lock:failed:{holder}"):
                number, *text = json.loads(error)
                raise error_map.get(number, pymysql.OperationalError)(number, *text)
            mine = lock.acquire(blocking=False, token=token)
            if mine:
                break
            holder = cache.get(lock.name) or holder
            time.sleep(POLL)
            with suppress(*MISS):
                return look(cache)
        # If somebody writes the key between WATCH and EXEC, our answer may be the older
        # one: it is not stored, and we look, or ask, again. Once is enough: whoever
        # interrupts the second round has asked after us.
        for _ in range(2):
            with suppress(redis.WatchError), cache.pipeline(True) as pipe:
                pipe.watch(key)
                if not renew:
                    with suppress(*MISS):
                        return look(cache)  # it came just before the lock was ours
                answer = ask()
                pipe.multi()
                store(pipe, answer)
                pipe.execute()
                warned.clear()
                break
    except pymysql.Error as error:
        if mine:
            with suppress(redis.RedisError, *AWAY):
                cache.setex(f"lock:failed:{token}", 1, json.dumps(error.args))
        raise
    except (redis.RedisError, *AWAY) as error:
        cache_failed(error)
        mine = mine and not isinstance(error, AWAY)  # or release() would wait as long
    finally:
        if mine:
            with suppress(redis.RedisError, *AWAY):  # LockError: it has expired
                lock.release()
    return ask() if answer is unknown else answer


# ---- Serialization: JSON, not pickle, for a value in Redis must not run code

# What JSON lacks becomes an object {type: value}; there are no other objects.
TYPES = {
    "Decimal": (str, Decimal),
    "datetime": (datetime.isoformat, datetime.fromisoformat),
    "date": (date.isoformat, date.fromisoformat),
    "timedelta": (lambda t: t // timedelta.resolution, lambda n: timedelta(0, 0, n)),
    "bytes": (bytes.hex, bytes.fromhex),
}


def mark(value):
    """A value that JSON lacks, as an object."""
    name = type(value).__name__
    write, _ = TYPES.get(name, (str, None))  # PyMySQL writes other arguments by str()
    return {name: write(value)}


def unmark(pairs):
    [(name, value)] = pairs
    return TYPES[name][1](value)


dumps = json.JSONEncoder(default=mark, ensure_ascii=False, separators=(",", ":")).encode
loads = json.JSONDecoder(object_pairs_hook=unmark).decode


def serialize(rows):
    names = list(rows[0]) if rows else []  # once, not in each row
    return dumps([len(rows), names, [[row[name] for row in rows] for name in names]])


def deserialize(text):
    count, names, columns = loads(text)
    if [len(column) for column in columns] != [count] * len(names):
        raise ValueError("not written by serialize")
    return [dict(zip(names, row)) for row in zip(*columns)]


# ---- The two techniques


def fetch(sql, args=None):
    """The rows of a query as a list of dicts, from MySQL or up to TTL seconds old.

    sql: a statement that returns rows; its text is the key.
    args: values for its %s, which PyMySQL escapes; they follow in the key.
    Raises pymysql.Error if MySQL refuses, or is down and the rows are not cached.
    """
    key = sql if args is None else f"{sql} {dumps(args)}"
    return cache_aside(
        key,
        look=lambda cache: deserialize(cache.get(key)),
        ask=lambda: query(sql, args),
        store=lambda cache, rows: cache.setex(key, int(TTL), serialize(rows)),
    )


def planet(id, renew=False):
    """The record as {'id': 1, 'name': 'Mercury'}, or None if there is none.

    id: a whole number, or text of one; anything else is a ValueError.
    renew: replace what the cache holds.
    Raises pymysql.Error if MySQL is down and the record is not cached.
    """
    id = int(str(id))  # int(1.5) would be 1, and MySQL takes even "1abc" for 1
    key = f"planet:{id}"

    def look(cache):
        fields = cache.hgetall(key)
        if fields == {"absent": "true"}:
            return None
        name = loads(fields["name"])
        if isinstance(name, list):  # as no value of MySQL is
            raise TypeError("not written by store")
        return {"id": int(fields["id"]), "name": name}

    def ask():
        rows = query("SELECT `id`, `name` FROM `planet` WHERE `id` = %s", (id,))
        return rows[0] if rows else None

    def store(cache, record):
        record = record or {"absent": True}
        cache.delete(key)  # or its old fields would stay
        cache.hset(key, mapping={name: dumps(value) for name, value in record.items()})
        cache.expire(key, int(TTL))  # Redis refuses 2.5: the hash would stay for ever

    if renew:
        return fill(key, look, ask, store, renew)
    return cache_aside(key, look, ask, store)


def save_planet(id, name):
    """Insert or rename a planet in MySQL, then in the cache; the record as planet(id).

    Raises pymysql.Error if MySQL refuses: nothing has changed then. If MySQL is lost on
    the way the row may be saved, and the cache behind by up to TTL seconds.
    """
    id = int(str(id))
    if not 0 < id < 2**32:  # MySQL makes 0 a new id, and may clip what is too large
        raise ValueError(f"not the id of a planet: {id}")
    insert = "INSERT INTO `planet` (`id`, `name`) VALUES (%s, %s)"
    sql = f"{insert} ON DUPLICATE KEY UPDATE `name` = %s"  # twice is as good as once
    query(sql, (id, name, name), write=True)
    return planet(id, renew=True)


if __name__ == "__main__":
    calls = [(fetch, "SELECT * FROM planet"), (planet, 1), (planet, 2), (planet, 3)]
    for function, argument in calls + calls:
        local.asked, start = False, time.perf_counter()
        try:
            answer = function(argument)
        except pymysql.Error as error:
            unusable(f"{error.args[-1]}; check DB_HOST and the other DB_ variables")
        milliseconds = 1000 * (time.perf_counter() - start)
        source = "miss, from MySQL" if local.asked else "hit, from Redis"
        print(f"{function.__name__}({argument!r}): {source}, {milliseconds:.2f} ms")
        print(f"    {answer}")
