"""Cache-aside: Redis in front of MySQL.

fetch(sql) caches the rows of a query as a string. record(key, sql) caches one row as a
hash, and planet(id) is a record. They look in Redis first. On a miss they load the result
from MySQL and store it in Redis for TTL seconds. query(sql) does not use the cache.

Promises:
- A hit returns what the miss returned, in values and types. It takes hardly longer than
  the bare Redis call, and 10,000 rows come several times faster than from MySQL.
- If many callers miss the same key, one queries MySQL and the others wait for it.
- If Redis is down, full or holds garbage, calls query MySQL instead, and a warning is
  logged, each at most once a minute. One process runs at most MAX_QUERIES queries at a
  time, so that MySQL is not flooded.
- A planet(id) that begins after save_planet has returned finds the new record.
- fetch runs in a read-only session, and a value in Redis cannot run code.
- Threads and forks do not share connections. One that MySQL has closed is replaced. If
  a caller gives up, MySQL does not go on with its query.
- A setting that is missing or malformed is named in one line.

Limits:
- A row that is changed or added in another way is old or missing for up to TTL seconds
  after it was loaded. So is what fetch has cached of a saved planet, and every planet
  if Redis cannot be reached, or refuses to write, while it is saved.
- While Redis is down or full, callers do not share a query. Errors are never shared. A
  load that takes longer than LOCK_TTL may be done twice.
- A caller that does not get one of the MAX_QUERIES places within MYSQL_TIMEOUT raises
  pymysql.OperationalError. If MySQL hangs, a call may take half a minute.
- One reply later than REDIS_TIMEOUT counts as a failure of Redis. So does a result that
  takes longer to send, of many MB, and one part of a cluster that cannot be reached.
- Keys do not name the database: give each database a Redis of its own.

Environment: REDIS_URL (redis://, or rediss:// with TLS) of a single node, any node of a
cluster or a serverless cache; DB_HOST, DB_USER, DB_PASS, DB_NAME. Optional: DB_PORT, and
DB_SSL_CA, a file of certificate authorities: MySQL must then show a certificate of one
of them. Needs Python 3.9, the packages in requirements.txt, MySQL 5.7.20 or
MariaDB 10.1 (the primary, not a replica), or newer, and the table in seed.sql.
"""

import functools
import json
import logging
import os
import ssl
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import date, datetime, timedelta
from decimal import Decimal

import pymysql
import redis

# All times are in seconds.
TTL = 10  # how long Redis keeps a result, in whole seconds
REDIS_TIMEOUT = 0.2  # the longest wait for one reply from Redis
REDIS_PAUSE = 5  # how long Redis is not used after it failed
MYSQL_TIMEOUT = 5  # the longest wait for one reply from MySQL
MAX_QUERIES = 10  # at a time in one process; MySQL's max_connections must allow for it
LOCK_TTL = MYSQL_TIMEOUT + 1  # then a lock expires, if the process that loads has died
MAX_WAIT = 2 * LOCK_TTL  # how long callers wait for another one to load
POLL_EVERY = 0.05  # how often they look for the result
WARN_EVERY = 60  # the same warning is not repeated within this time

MISS = object()  # what a look-up returns if the key is not in Redis
NO_ROW = {"absent": ""}  # the hash for "no such row"; the fields of a row are JSON

# A RedisClusterException means that a part of a cluster cannot be reached.
REDIS_ERRORS = (redis.RedisError, redis.exceptions.RedisClusterException)
# An ExecAbortError means that Redis became full between MULTI and EXEC.
FULL_ERRORS = (redis.OutOfMemoryError, redis.exceptions.ExecAbortError)

log = logging.getLogger(__name__)

# ---- Settings

# The script prints one line and exits. If the module is imported, a ValueError is raised.
SettingError = SystemExit if __name__ == "__main__" else ValueError

required = ["REDIS_URL", "DB_HOST", "DB_USER", "DB_PASS", "DB_NAME"]
if missing := [name for name in required if not os.environ.get(name)]:
    raise SettingError(f"not set in the environment: {', '.join(missing)}")

# ---- The two techniques
# Each hands three functions to cache_aside: read looks in Redis, load queries MySQL, and
# store queues commands in a pipe, which sends them to Redis together.


def fetch(sql, args=None):
    """Return the rows of a query as a list of dicts, from Redis or MySQL.

    sql: a statement that returns rows. args: the values for each %s in it.
    The key in Redis is the sql, followed by the args if there are any.
    Raises pymysql.Error if the rows are not cached and the query fails.
    """
    key = sql if args is None else f"{sql} {args!r}"

    def read(client):
        text = client.get(key)
        return MISS if text is None else deserialize(text)

    def load():
        return query(sql, args)

    def store(pipe, rows):
        pipe.setex(key, int(TTL), serialize(rows))

    return cache_aside(key, read, load, store)


def record(key, sql, args=None):
    """Return one row as a dict, or None if there is no such row.

    key: where the row is kept in Redis, as a hash. sql: a SELECT of one row.
    args: as for fetch. Raises pymysql.Error if it is not cached and the query fails.
    """

    def read(client):
        fields = client.hgetall(key)
        if not fields:
            return MISS
        if fields == NO_ROW:
            return None
        return {name: from_json(text) for name, text in fields.items()}

    def load():
        rows = query(sql, args)
        return rows[0] if rows else None

    def store(pipe, row):
        fields = NO_ROW
        if row is not None:
            fields = {name: to_json(value) for name, value in row.items()}
        pipe.delete(key)  # without this, fields of an older record could remain
        pipe.hset(key, mapping=fields)
        pipe.expire(key, int(TTL))

    return cache_aside(key, read, load, store)


def planet(id):
    """Return {'id': 1, 'name': 'Mercury'}, or None if there is no such planet.

    id: a whole number, or text of one. Raises ValueError for anything else.
    """
    id = int(str(id))  # int(1.5) would be 1, and MySQL would take "1abc" for 1
    return record(f"planet:{id}", "SELECT id, name FROM planet WHERE id = %s", (id,))


def save_planet(id, name):
    """Insert or rename a planet in MySQL, and return the new record.

    Raises ValueError if no planet can have this id. Raises pymysql.Error if MySQL
    fails; the planet may be saved nevertheless, and old in Redis for TTL seconds.
    """
    id = int(str(id))
    if not 0 < id < 2**32:  # INT UNSIGNED AUTO_INCREMENT: 0 would become another id
        raise ValueError(f"not the id of a planet: {id}")
    sql = "INSERT INTO planet SET id = %s, name = %s ON DUPLICATE KEY UPDATE name = %s"
    try:
        query(sql, (id, name, name), write=True)
    finally:  # even after an error: MySQL may have saved, and only its reply was lost
        invalidate(f"planet:{id}")
    return planet(id)


# ---- The strategy they share


def cache_aside(key, read, load, store):
    """Return the result from Redis. On a miss, load it from MySQL and store it.

    read(client): returns the result that is in Redis, or MISS.
    load(): returns the result from MySQL.
    store(pipe, result): queues the Redis commands that store the result.
    """
    if redis_is_paused():
        return load()
    try:
        client = redis_client()
        if (result := look_up(client, read)) is not MISS:
            log.debug("hit: %s", key)
            return result

        # Remember what load() returns. If Redis fails after the query, the last line of
        # this function then returns the same result without a second query.
        load = functools.cache(load)

        # One caller gets the lock and loads. The others look for its result in Redis.
        # After MAX_WAIT they stop waiting and load without the lock. The lock only saves
        # queries: what keeps old results out of Redis is WATCH, in load_and_store.
        lock = client.lock(f"lock:{key}", timeout=LOCK_TTL)
        deadline = time.monotonic() + MAX_WAIT
        while not lock.acquire(blocking=False):
            if time.monotonic() > deadline:
                return load()
            time.sleep(POLL_EVERY)
            if (result := look_up(client, read)) is not MISS:
                return result
        try:
            return load_and_store(client, key, read, load, store)
        finally:
            with suppress(*REDIS_ERRORS):  # a lock that is not released expires
                lock.release()
    except REDIS_ERRORS as error:
        redis_failed(error)
        return load()


def load_and_store(client, key, read, load, store):
    """Load the result, and store it unless the key was changed in the meantime.

    A slow reader must not store an old record after a save. Commands between MULTI and
    EXEC are carried out together. WATCH makes Redis refuse them if the key was changed:

        reader                       save_planet
        WATCH key
        SELECT: the old record
                                     INSERT ... ON DUPLICATE KEY UPDATE
                                     invalidate: SET key, DELETE key
        MULTI, store, EXEC: refused
    """
    with client.pipeline(transaction=True) as pipe:
        pipe.watch(key)
        # The caller that had the lock before may have stored the result.
        if (result := look_up(client, read)) is not MISS:
            return result
        result = load()
        pipe.multi()
        store(pipe, result)
        try:
            pipe.execute()
        except redis.WatchError as error:
            # The key was changed: the result is not stored. redis-py raises this error,
            # with another message, if the connection was lost, too.
            if "Watched variable" not in str(error):
                raise
        return result


def invalidate(key):
    """Remove a key from Redis. Call it after each change of its row in MySQL."""
    try:
        client = redis_client()
        refuse_slow_readers(client, key)
        # A full Redis refuses the line above, but not this one. The lock is deleted so
        # that the next caller does not wait for a slow reader, and gets the new row.
        client.delete(key, f"lock:{key}")
    except REDIS_ERRORS as error:
        warn("a key in Redis may stay old for TTL seconds", type(error).__name__)
        # save_planet must not return the old record, which may still be there.
        redis_failed(error, pause_if_read_only=True)


def refuse_slow_readers(client, key):
    """Change the key, so that Redis refuses the EXEC of those who WATCH it.

    If the key is not there, DELETE does not change it, but SET does.
    """
    pipe = client.pipeline(transaction=True)
    pipe.set(key, "")
    pipe.delete(key)
    with suppress(*FULL_ERRORS):  # a full Redis also refuses the slow reader's EXEC
        pipe.execute()


def look_up(client, read):
    """Return read(client), or MISS if the value in Redis cannot be read."""
    try:
        return read(client)
    except Exception as error:
        # If Redis failed, that is for the caller. WRONGTYPE is no failure: the key holds
        # another kind of value, such as a list. Any other error comes from decoding.
        if isinstance(error, REDIS_ERRORS) and "WRONGTYPE" not in str(error):
            raise
        # Only the type of the error is logged, because its text can quote the value.
        warn("a value in Redis cannot be read, it is replaced", type(error).__name__)
        return MISS


# ---- Serialization: JSON, because unpickling a value could run code

# Decimal("1.50") becomes {"Decimal": "1.50"}. A column of such values becomes one object,
# {"Decimal": ["1.50", "2.00"]}, which is read much faster than one for each value.
# No type is written as a list, so a list is always a column.
# These are the types that JSON lacks: how to write a value, and how to read it.
CODECS = {
    "Decimal": (str, Decimal),
    "datetime": (datetime.isoformat, datetime.fromisoformat),
    "date": (date.isoformat, date.fromisoformat),
    "timedelta": (timedelta.total_seconds, lambda number: timedelta(seconds=number)),
    "bytes": (bytes.hex, bytes.fromhex),
}


def encode(value):
    """Return what JSON stores for a value of a type that it lacks."""
    name = type(value).__name__
    return {name: CODECS[name][0](value)}


def encode_column(values):
    """Return what JSON stores for a column. Only if all have one type, one object."""
    name = type(values[0]).__name__
    if name not in CODECS or {type(value).__name__ for value in values} != {name}:
        return values  # encode is then called for each value that JSON lacks
    return {name: list(map(CODECS[name][0], values))}


def decode(pairs):
    """Return the value or the column that one JSON object stands for."""
    [(name, value)] = pairs
    convert = CODECS[name][1]
    return list(map(convert, value)) if isinstance(value, list) else convert(value)


to_json = json.JSONEncoder(default=encode, separators=(",", ":")).encode
decoder = json.JSONDecoder(object_pairs_hook=decode)


def from_json(text):
    # json.loads also looks for spaces around the value: a hit would take 3 % longer.
    return decoder.raw_decode(text)[0]


def serialize(rows):
    """Return the names, then the columns: [["id","name"],[[1,2],["Mercury","Venus"]]].

    10,000 rows are read twice as fast in this form as in a list of objects.
    """
    names = list(rows[0]) if rows else []
    columns = zip(*map(dict.values, rows))
    return to_json([names, list(map(encode_column, columns))])


def deserialize(text):
    names, columns = from_json(text)
    return [dict(zip(names, row)) for row in zip(*columns)]


# ---- Redis

REDIS_OPTIONS = {
    "url": os.environ["REDIS_URL"],
    "decode_responses": True,
    "socket_timeout": REDIS_TIMEOUT,
    "socket_connect_timeout": REDIS_TIMEOUT,
    # The default, several retries with pauses, would take seconds.
    "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
}
try:  # this checks the URL and does not connect
    redis.Redis.from_url(**REDIS_OPTIONS).connection_pool.make_connection()
except (TypeError, ValueError, redis.RedisError):
    # Not with the text of this error: it could show the password.
    raise SettingError("REDIS_URL is not like redis://user:pass@host:port") from None

paused_until = 0  # the time.monotonic() at which Redis is used again
warned_at = {}  # warning -> the time.monotonic() at which it was logged


@functools.cache
def redis_client():
    """Return a client for the node in REDIS_URL, or for the cluster it belongs to."""
    client = redis.Redis.from_url(**REDIS_OPTIONS)
    if client.info("cluster").get("cluster_enabled"):
        client = redis.RedisCluster.from_url(**REDIS_OPTIONS)
    return client


def redis_is_paused():
    return time.monotonic() < paused_until


def redis_failed(error, pause_if_read_only=False):
    """Log the error, and decide how to go on.

    Redis is full        go on: it still serves hits
    Redis is read-only   go on, but connect again: after a failover, the host name
                         leads to another node. Pause as well if pause_if_read_only.
    any other error      do not use Redis for REDIS_PAUSE, then connect again
    """
    global paused_until
    if redis_is_paused():  # a save uses Redis even now, but does not prolong the pause
        return
    # redis-py may quote the command, with its data, before "caused error: ".
    warn("Redis failed, MySQL is used", str(error).split("caused error: ")[-1])
    if isinstance(error, FULL_ERRORS):
        return
    redis_client.cache_clear()
    if isinstance(error, redis.ReadOnlyError) and not pause_if_read_only:
        return
    paused_until = time.monotonic() + REDIS_PAUSE


def warn(problem, reason):
    """Log a warning, unless the same problem was logged in the last WARN_EVERY seconds."""
    now = time.monotonic()
    if problem not in warned_at or now - warned_at[problem] >= WARN_EVERY:
        warned_at[problem] = now
        log.warning("%s: %s", problem, reason)


# ---- MySQL

# One statement for MySQL, which reads /*! */, and MariaDB, which reads /*M! */. A session
# is read-only. MySQL ends a query, or a wait for a lock, after its caller has given up.
SESSION_SETTINGS = f"""SET SESSION
    /*!50720 transaction_read_only = 1, max_execution_time = {int(MYSQL_TIMEOUT * 1000)}, */
    /*M!100101 tx_read_only = 1, max_statement_time = {MYSQL_TIMEOUT}, */
    innodb_lock_wait_timeout = 2, lock_wait_timeout = 2"""
port = os.environ.get("DB_PORT") or "3306"
if not (port.isdecimal() and 0 < int(port) < 65536):
    raise SettingError(f"DB_PORT is not a port number: {port!r}")
MYSQL_OPTIONS = {
    "host": os.environ["DB_HOST"],
    "port": int(port),
    "user": os.environ["DB_USER"],
    "password": os.environ["DB_PASS"].encode(),  # PyMySQL would send text as Latin-1
    "database": os.environ["DB_NAME"],
    "cursorclass": pymysql.cursors.DictCursor,
    # Without autocommit, one transaction never ends and always sees the same data.
    "autocommit": True,
    "init_command": SESSION_SETTINGS,
    "connect_timeout": MYSQL_TIMEOUT,
    "read_timeout": MYSQL_TIMEOUT,
    "write_timeout": MYSQL_TIMEOUT,
}
if ca := os.environ.get("DB_SSL_CA"):
    try:  # PyMySQL then requires TLS, and checks certificate and host name
        MYSQL_OPTIONS["ssl"] = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise SettingError(f"DB_SSL_CA cannot be used: {ca!r}: {error}") from None


@functools.cache
def slots_and_idle(pid):
    """Return the slots and the idle connections of a process. A fork has its own."""
    return threading.Semaphore(MAX_QUERIES), []


slots_and_idle(os.getpid())  # now, because two threads at once would make two of them


@contextmanager
def mysql_connection():
    """Lend a connection to one caller. Raise if no slot is free for MYSQL_TIMEOUT."""
    slots, idle = slots_and_idle(os.getpid())
    if not slots.acquire(timeout=MYSQL_TIMEOUT):
        raise pymysql.OperationalError(1040, f"{MAX_QUERIES} queries are running here")
    try:
        connection = take_idle(idle) or pymysql.connect(**MYSQL_OPTIONS)
        try:
            yield connection
        except BaseException:
            connection.close()  # its state is unknown
            raise
        idle.append(connection)
    finally:
        slots.release()


def take_idle(idle):
    """Take an idle connection. Return None if there is none, or MySQL has closed it."""
    with suppress(IndexError, pymysql.Error):
        connection = idle.pop()
        connection.ping(reconnect=False)
        return connection
    return None


def query(sql, args=None, write=False):
    """Run one statement in MySQL and return its rows as a list of dicts.

    write: the statement may change data. Raises pymysql.Error.
    """
    with mysql_connection() as connection, connection.cursor() as cursor:
        if write:
            cursor.execute("SET TRANSACTION READ WRITE")  # only for the next statement
        start = time.perf_counter()
        cursor.execute(sql, args)
        rows = list(cursor.fetchall())
        log.debug("MySQL, %.2f ms: %s", 1000 * (time.perf_counter() - start), sql)
        # A statement without rows may have changed the session, as START TRANSACTION READ
        # WRITE does. Because of this error, the connection is not used again.
        if not (write or cursor.description):
            raise pymysql.ProgrammingError(f"not a query: {sql}")
    return rows


# ---- The demonstration

if __name__ == "__main__":
    calls = [(fetch, "SELECT * FROM planet"), (planet, 1), (planet, 2), (planet, 3)]
    try:
        # A miss, so that both servers are connected before times are taken.
        fetch("SELECT %s", (time.time(),))
        logging.basicConfig(format="    %(message)s", stream=sys.stdout)
        log.setLevel("DEBUG")
        for function, argument in calls + calls:
            print(f"{function.__name__}({argument!r})")
            start = time.perf_counter()
            result = function(argument)
            print(f"    {1000 * (time.perf_counter() - start):.2f} ms: {result}")
    except pymysql.Error as error:
        sys.exit(f"MySQL: {error.args[-1]}; check DB_HOST and the other DB_ variables")
