"""Cache-aside: Redis in front of MySQL.

fetch(sql) caches the rows of a query, as a string. record(key, sql) caches one row, as a
hash, and planet(id) shows how to use it. On a miss, they load the result from MySQL, and
store it in Redis for TTL seconds.

The seven-line version is GET; on a miss, the query, and SETEX. What this adds, and where:
- If many callers miss the same key, one loads and the others wait (cache_aside).
- A slow reader does not store an old row after a save (store_if_lock_held).
- If Redis fails, a call queries MySQL instead, and a warning says why (RedisMayFail).
- If a save cannot delete the old row from Redis, the same process tries again before it next
  looks up this row (redis_can_be_used).
- An interrupted call leaves no unread reply for the next one (RedisMayFail).
- A value that cannot be read is replaced (look_up). Every key expires, even if a process dies
  (store_if_lock_held).
- A hit returns what the miss returned, in values and types (encode). A hit of 10,000 rows is
  about seven times as fast as MySQL (rows_to_json). A value in Redis cannot run code.
- A process opens at most MAX_CONNECTIONS to MySQL. A connection is used by one caller at a
  time, and opened again if MySQL has closed it (mysql_connection). Queries cannot write
  (MYSQL_OPTIONS).
- Redis may be a single node, a cluster or a serverless cache (redis_client).
The limits are listed near the end of this file.

Environment: REDIS_URL (redis://, or rediss:// with TLS), DB_HOST, DB_USER, DB_PASS and
DB_NAME. Optional: DB_PORT, and DB_SSL_CA, a file of certificate authorities. Without
DB_SSL_CA, TLS is used only if MySQL offers it, and the certificate is not verified.
Needs the packages in requirements.txt, Linux or macOS, and at least Python 3.9, Redis 6.2,
and MySQL 5.7.20 or MariaDB 10.1. With asyncio, call the functions in a thread.
"""

import functools
import json
import logging
import os
import queue
import re
import ssl
import sys
import time
from contextlib import contextmanager, suppress
from datetime import date, datetime, timedelta
from decimal import Decimal

import pymysql
import redis
from redis.exceptions import ClusterDownError, LockError, MovedError

# All times are in seconds.
TTL = 10  # how long Redis keeps a result
REDIS_TIMEOUT = 0.2  # to connect to Redis, or to wait for a reply
REDIS_PAUSE = 5  # how long Redis is not used after it failed
MYSQL_TIMEOUT = 5  # to connect to MySQL, or to wait for its reply
MAX_CONNECTIONS = 20  # to MySQL, per process; MySQL must allow them for all processes
# One caller loads, and has a lock. Its process can die, so the lock expires. If a load takes
# longer than LOCK_TTL, for example because it waits for a connection, its result is not stored.
LOCK_TTL = 2 * MYSQL_TIMEOUT  # 10, because connecting and the query can take 5 each
# The others wait at most MAX_WAIT. This is longer than LOCK_TTL, so that one of them can get the
# lock after it has expired, and load.
MAX_WAIT = LOCK_TTL + MYSQL_TIMEOUT  # 15
POLL_EVERY = 0.05  # how long they sleep before they look in Redis again
WARN_EVERY = 60  # the same warning is not repeated within this time

MISS = object()  # what a look-up returns if the key is not in Redis
# All errors of redis-py. (RedisClusterException is not a subclass of RedisError.)
REDIS_ERRORS = (redis.RedisError, redis.RedisClusterException)
# All errors that a value can cause when it is converted.
VALUE_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError)
paused_until = 0  # before this time.monotonic(), nothing is looked up in Redis
failed_deletes = {}  # key that a save could not delete -> a token, new for each failure

# At level DEBUG, the log shows the key of each hit, with its args, and the SQL of each query.
log = logging.getLogger(__name__)

# ---- Settings

# A wrong setting raises a ValueError. If this file is run as a script, Python shows it as one line.
if __name__ == "__main__":
    sys.tracebacklimit = 0

required = ["REDIS_URL", "DB_HOST", "DB_USER", "DB_PASS", "DB_NAME"]
if missing := [name for name in required if not os.environ.get(name)]:
    raise ValueError(f"not set in the environment: {', '.join(missing)}")

# ---- The two techniques: rows as a string, and a row as a hash


def fetch(sql, args=None, ttl=None):
    """Return the rows of a query as a list of dicts, from Redis or MySQL.

    sql: a statement that returns rows. args: the values for each %s in it. (With args, any
    other % is written as %%.) ttl: how many seconds Redis keeps the rows, instead of TTL.
    Raises pymysql.Error if they are not cached and the query fails.
    """
    key = fetch_key(sql, args)
    ttl = ttl_in_seconds(ttl)

    # The two techniques differ in these three steps, which cache_aside calls.

    def read(client):
        text = client.get(key)
        return MISS if text is None else rows_from_json(text)

    def load():
        return query(sql, args)

    def store(pipe, rows):  # pipe: a redis-py pipeline, which sends commands together
        pipe.setex(key, ttl, rows_to_json(rows))

    return cache_aside(key, read, load, store)


# The hash for "no such row". In a row, each field is JSON, and JSON is never an empty text.
NO_ROW = {"absent": ""}


def record(key, sql, args=None, ttl=None):
    """Return one row as a dict, or None if there is no such row.

    key: the key in Redis. Each row needs its own, and so does each list of columns. It must
    not contain a }. sql: a SELECT of one row. args, ttl: as for fetch. Raises pymysql.Error
    if the row is not cached and the query fails. On a hit, the columns can be in another order.
    """
    ttl = ttl_in_seconds(ttl)

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
        # No old fields can remain: the caller has the lock, and the key is not in Redis.
        pipe.hset(key, mapping=fields)
        pipe.expire(key, ttl)

    return cache_aside(key, read, load, store)


def planet(id):
    """Return {'id': 1, 'name': 'Mercury'}, or None if there is no such planet.

    id: a whole number, or text of one. Raises ValueError for anything else.
    """
    id = int(str(id))  # int(1.5) would be 1, and MySQL would take "1abc" for 1
    return record(f"planet:{id}", "SELECT id, name FROM planet WHERE id = %s", (id,))


def save_planet(id, name):
    """Insert or rename a planet in MySQL, and return the new record.

    Raises ValueError if no planet can have this id. Raises pymysql.Error if MySQL fails. The
    planet may be saved nevertheless.
    """
    id = int(str(id))
    # MySQL saves 0 under the next free id, and may save an id that is too large as 2**32 - 1.
    if not 0 < id < 2**32:
        raise ValueError(f"not the id of a planet: {id}")
    sql = "INSERT INTO planet SET id = %s, name = %s ON DUPLICATE KEY UPDATE name = %s"
    try:
        write(sql, (id, name, name))
    finally:  # even after an error: MySQL may have saved, and only its reply was lost
        invalidate(f"planet:{id}")
    return planet(id)


def fetch_key(sql, args=None):
    """Return the key of these rows, as in invalidate(fetch_key(sql, args)).

    sql, args: as for fetch, and written in the same way. [1] and (1,) make different keys, and
    a set makes another key in each process. The repr of each argument must show its value: an
    object without a __repr__ shows its address, which another object can have later.
    """
    key = sql if args is None else f"{sql} {args!r}"
    # A } becomes \x7d, because name_of_lock refuses it. A \ is doubled, so that different keys
    # stay different.
    return key.replace("\\", r"\\").replace("}", r"\x7d")


def ttl_in_seconds(ttl):
    """Return ttl as a whole number, or TTL if it is None."""
    ttl = int(TTL if ttl is None else ttl)
    # With 0, EXPIRE deletes the hash at once. With a huge number it fails, and the hash would
    # never expire.
    if not 0 < ttl < 2**31:
        raise ValueError(f"a TTL must be from 1 to {2**31 - 1} seconds, not {ttl}")
    return ttl


# ---- The strategy they share


def cache_aside(key, read, load, store):
    """Return the result from Redis. On a miss, load it from MySQL and store it.

    read(client) returns the result that is in Redis, or MISS. load() returns the result
    from MySQL. store(pipe, result) stores it in Redis.

    One caller gets the lock of the key and loads. The others wait for its result. If its load
    fails, the next one gets the lock. If its process dies, the lock expires after LOCK_TTL. A
    caller that has waited for MAX_WAIT loads without a lock.
    """
    lock_name = name_of_lock(key)
    deadline = time.monotonic() + MAX_WAIT
    with RedisMayFail():
        while redis_can_be_used(key) and time.monotonic() < deadline:
            result = look_up(key, read)
            if result is not MISS:
                return result
            lock = client_for(key).lock(lock_name, timeout=LOCK_TTL)
            if lock.acquire(blocking=False):
                return load_with_lock(lock, key, read, load, store)
            time.sleep(POLL_EVERY)
    # Redis has failed or is paused, or this caller has waited for MAX_WAIT.
    return load()


def look_up(key, read):
    """Return the result that is in Redis, or MISS. Delete a value that cannot be read."""
    client = client_for(key)
    try:
        result = read(client)
    except (redis.ResponseError, *VALUE_ERRORS) as error:
        # WRONGTYPE means that the key holds a value of another type, such as a list. Any other
        # error of Redis is for cache_aside.
        if isinstance(error, redis.ResponseError) and "WRONGTYPE" not in str(error):
            raise
        # Only the type of the error is logged, because its text can quote the value.
        warn("a value in Redis cannot be read, it is replaced", type(error).__name__)
        client.delete(key)
        return MISS
    if result is not MISS:
        log.debug("hit: %s", key)
    return result


def load_with_lock(lock, key, read, load, store):
    """Load the result and store it, if it is still not in Redis. Release the lock."""
    try:
        # Look again: another caller may have stored it just before this one got the lock.
        result = look_up(key, read)
        if result is MISS:
            result = load()
            with RedisMayFail():
                store_if_lock_held(lock, store, result)
        return result
    finally:
        with RedisMayFail():
            lock.release()


def store_if_lock_held(lock, store, result):
    """Store the result, unless this caller has lost the lock while it loaded.

    A slow reader must not store an old record after a save. So the save deletes the lock:

        reader                       save_planet
        take the lock
        SELECT: the old record
                                     INSERT ... ON DUPLICATE KEY UPDATE
                                     invalidate: DELETE the key and the lock
        WATCH the lock: it is lost, so do not store
    """
    with lock.redis.pipeline(transaction=True) as pipe:
        # owned() asks Redis on another connection. WATCH comes before it. So, if the lock is
        # lost after owned(), execute() raises a WatchError, and stores nothing.
        pipe.watch(lock.name)
        if lock.owned():
            pipe.multi()  # from here on, the pipe only collects the commands
            store(pipe, result)
            pipe.execute()  # Redis carries them out together


def invalidate(key):
    """Delete a key and its lock from Redis. Call it after the COMMIT that changes its row.

    If Redis fails, this raises no error. This process then deletes the key before it next looks
    up this key.
    """
    lock_name = name_of_lock(key)
    failure = failed_deletes.get(key)
    deleted = None
    try:
        with RedisMayFail():
            deleted = client_for(key).delete(key, lock_name)  # how many of the two
    finally:
        if deleted is None:  # Redis has failed, or this call was interrupted
            failed_deletes[key] = object()
        elif failed_deletes.get(key) is failure:  # no other thread has failed meanwhile
            failed_deletes.pop(key, None)


def redis_can_be_used(key):
    """Return False in a pause, or if an old record still cannot be deleted."""
    if time.monotonic() < paused_until:
        return False
    if key in failed_deletes:
        invalidate(key)
    return key not in failed_deletes


def name_of_lock(key):
    """Return the key of the lock: lock:{planet:1}

    In a cluster, a transaction needs both keys on one node. The braces make Redis choose
    the node of planet:1. They end at the first }, so a key must not contain one.
    """
    if "}" in key:
        raise ValueError("a key must not contain a }: " + key)
    return "lock:{" + key + "}"


# ---- Serialization: JSON, because unpickling a value could run code

# The types that JSON lacks: how a value is converted for JSON, and how it is restored.
CODECS = {
    "Decimal": (str, Decimal),
    "datetime": (datetime.isoformat, datetime.fromisoformat),
    "date": (date.isoformat, date.fromisoformat),
    "timedelta": (timedelta.total_seconds, lambda number: timedelta(seconds=number)),
    "bytes": (bytes.hex, bytes.fromhex),
}


def encode(value):
    """Decimal("1.50") -> {"type": "Decimal", "value": "1.50"}"""
    name = type(value).__name__
    convert, _ = CODECS[name]
    return {"type": name, "value": convert(value)}


def encode_column(values):
    """[Decimal("1.50"), None] -> {"type": "Decimal", "values": ["1.50", None]}

    A column of another type, or of several types, is returned as it is.
    """
    types = set(map(type, values)) - {type(None)}
    if len(types) == 1:
        name = types.pop().__name__
        if name in CODECS:
            convert, _ = CODECS[name]
            return {"type": name, "values": map_values(convert, values)}
    return values


def decode(encoded):
    """Undo encode and encode_column."""
    _, restore = CODECS[encoded["type"]]
    if "values" in encoded:
        return map_values(restore, encoded["values"])
    return restore(encoded["value"])


def map_values(function, values):
    """Call the function for each value that is not None."""
    return [None if value is None else function(value) for value in values]


# The encoder calls encode for each value of a type that JSON lacks.
to_json = json.JSONEncoder(default=encode, separators=(",", ":")).encode
decoder = json.JSONDecoder(object_hook=decode)


def from_json(text):
    """Undo to_json. Like decoder.decode, but twice as fast for a short text."""
    value, end = decoder.raw_decode(text)
    if end < len(text):
        raise ValueError("there is more after the value")
    return value


# Rows are stored as columns, so that the type of a column is stored and looked up once. With
# its type beside each value, decoding 10,000 rows takes almost twice as long.


def rows_to_json(rows):
    """[{"id": 1, "name": "Mercury"}] -> [["id","name"],[[1],["Mercury"]]]"""
    names = list(rows[0]) if rows else []
    columns = [encode_column([row[name] for row in rows]) for name in names]
    return to_json([names, columns])


def rows_from_json(text):
    """Undo rows_to_json."""
    names, columns = from_json(text)
    rows = [{} for _ in columns[0]] if columns else []  # an empty dict for each row
    # To fill them column by column is twice as fast as dict(zip(names, row)) for each row.
    for name, column in zip(names, columns):
        for row, value in zip(rows, column):
            row[name] = value
    return rows


# ---- Redis

REDIS_OPTIONS = {
    "url": os.environ["REDIS_URL"],
    "decode_responses": True,
    "socket_timeout": REDIS_TIMEOUT,
    "socket_connect_timeout": REDIS_TIMEOUT,
}
try:
    # If a password has a / in it, redis-py may read the part before it as a port, and show it.
    if re.search("//.*[/?#].*@", REDIS_OPTIONS["url"]):
        raise ValueError
    # make_connection checks the URL, and does not connect.
    redis.Redis.from_url(**REDIS_OPTIONS).connection_pool.make_connection()
except (TypeError, ValueError, redis.RedisError):
    # The text of this error is left out because it could show the password.
    raise ValueError("REDIS_URL is not like redis://user:pass@host:port") from None

# After one of these errors, Redis is paused. After any other, it is still used: it has refused a
# command, for example because it is full, but it still serves hits.
OUT_OF_REACH = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.RedisClusterException,
    ClusterDownError,
)
# After one of these errors, a new client finds the right node: after a failover, REDIS_URL can lead
# to another one, and in a cluster, a key can move to another one.
WRONG_NODE = (redis.ReadOnlyError, MovedError)
warned_at = {}  # warning -> the time at which it was last logged


@functools.cache
def redis_client():
    """Return a client for the node in REDIS_URL, or for the cluster it belongs to.

    redis-py lends a connection to one thread at a time.
    """
    client = redis.Redis.from_url(**REDIS_OPTIONS)
    # A node that does not belong to a cluster refuses this command.
    with suppress(redis.ResponseError):
        client.cluster("SLOTS")
        client = redis.RedisCluster.from_url(**REDIS_OPTIONS)
    # redis-py closes a client that is no longer used. After a fork, this can block the child
    # without end, because a thread of the parent had a lock of the client.
    client.close = lambda: None
    return client


os.register_at_fork(after_in_child=redis_client.cache_clear)


def client_for(key):
    """Return a client for the node that holds this key.

    RedisCluster would handle an error itself: it would look for the nodes again, in one thread
    after the other. The client of a node raises the error, and handle_redis_error handles it.
    """
    client = redis_client()
    if isinstance(client, redis.Redis):
        return client
    return client.get_redis_connection(client.get_node_from_key(key))


class RedisMayFail:
    """If Redis fails in a `with RedisMayFail():` block, go on after the block."""

    def __enter__(self):
        pass

    def __exit__(self, error_type, error, traceback):
        if isinstance(error, REDIS_ERRORS):
            handle_redis_error(error)
            return True  # do not raise the error again
        if error and not isinstance(error, (pymysql.Error, *VALUE_ERRORS)):
            # Something else has interrupted the call, such as Ctrl-C or the time limit of a job
            # queue. A reply can be unread on a connection, and the next command would take it for
            # its own. So use a new client.
            redis_client.cache_clear()
        return False  # raise it


def handle_redis_error(error):
    """Log a warning. If Redis is out of reach, do not look anything up in it for REDIS_PAUSE."""
    global paused_until
    # A WatchError with another text means that the connection was lost. That is a failure.
    if isinstance(error, LockError) or str(error) == "Watched variable changed.":
        return  # not a failure: a save has deleted the lock, or it has expired
    warn(f"a command to Redis failed with a {type(error).__name__}", error)
    if isinstance(error, OUT_OF_REACH + WRONG_NODE):
        redis_client.cache_clear()
    # invalidate tries Redis even in a pause. Its failures do not make the pause longer.
    if isinstance(error, OUT_OF_REACH) and time.monotonic() >= paused_until:
        paused_until = time.monotonic() + REDIS_PAUSE


def warn(problem, reason):
    """Log a warning, unless it was logged in the last WARN_EVERY seconds."""
    now = time.monotonic()
    if now - warned_at.get(problem, -WARN_EVERY) >= WARN_EVERY:
        warned_at[problem] = now
        # Leave out the data that errors quote. redis-py: "Command # 1 (SETEX key 10 rows) of
        # pipeline caused error: out of memory". Redis: "unknown command, with args: rows".
        text = str(reason).split("caused error: ")[-1].split(", with args")[0]
        log.warning("%s: %s", problem, text)


# ---- MySQL

port = os.environ.get("DB_PORT") or "3306"
if not (port.isdecimal() and 0 < int(port) < 65536):
    raise ValueError(f"DB_PORT is not a port number: {port!r}")
MYSQL_OPTIONS = {
    "host": os.environ["DB_HOST"],
    "port": int(port),
    "user": os.environ["DB_USER"],
    # Bytes, because PyMySQL would send text as Latin-1.
    "password": os.fsencode(os.environ["DB_PASS"]),
    "database": os.environ["DB_NAME"],
    "cursorclass": pymysql.cursors.DictCursor,
    # Without autocommit, a connection stays in its first transaction and sees no later change.
    "autocommit": True,  # set again below, because MySQL can say that it is on when it is off
    "connect_timeout": MYSQL_TIMEOUT,
    "read_timeout": MYSQL_TIMEOUT,
    "write_timeout": MYSQL_TIMEOUT,
    # The server ends a wait for a lock after 2 s, and a query just before PyMySQL would give up.
    # Queries cannot write. The servers have different names for the last two. MySQL (5.7.20 or
    # newer) runs the text in /*!50720 */, and MariaDB the text in /*M! */. Each of them ignores
    # the other text. A completion_type of 1 would make a COMMIT begin another transaction.
    "init_command": "SET SESSION autocommit = 1, completion_type = 0,"
    " innodb_lock_wait_timeout = 2, lock_wait_timeout = 2,"
    " /*!50720 transaction_read_only = 1,"
    f" max_execution_time = {1000 * MYSQL_TIMEOUT - 100:.0f} */"  # milliseconds
    f" /*M! tx_read_only = 1, max_statement_time = {MYSQL_TIMEOUT - 0.1} */",
}
if ca := os.environ.get("DB_SSL_CA"):
    try:  # PyMySQL then refuses a server without TLS, or with another certificate or name
        MYSQL_OPTIONS["ssl"] = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ValueError(f"DB_SSL_CA cannot be used: {ca!r}: {error}") from None


def reset_connections():
    """Start without a connection to MySQL. A child must not use those of its parent."""
    global idle_connections, connection_slots
    idle_connections = []
    # Not a Semaphore: it has a lock of its own. An interrupted call could keep this lock, and then
    # all others would hang.
    connection_slots = queue.SimpleQueue()
    for _ in range(MAX_CONNECTIONS):
        connection_slots.put("slot")


reset_connections()
os.register_at_fork(after_in_child=reset_connections)


@contextmanager
def mysql_connection():
    """Lend a connection, which no other caller uses meanwhile.

    If MAX_CONNECTIONS are in use, wait for up to MYSQL_TIMEOUT. Raises pymysql.Error.
    """
    slot = take_slot()
    try:
        connection = open_connection()
        try:
            yield connection
        except BaseException:
            connection.close()  # its state is unknown
            raise
        idle_connections.append(connection)
    finally:
        connection_slots.put(slot)


def take_slot():
    try:
        return connection_slots.get(timeout=MYSQL_TIMEOUT)
    except queue.Empty:
        # 1040 is MySQL's own number for too many connections.
        raise pymysql.OperationalError(1040, "all MAX_CONNECTIONS are in use") from None


def open_connection():
    """Return an idle connection, or a new one if none is idle or MySQL has closed it."""
    with suppress(IndexError, pymysql.Error):
        connection = idle_connections.pop()
        connection.ping(reconnect=False)
        return connection
    return pymysql.connect(**MYSQL_OPTIONS)


def query(sql, args=None):
    """Return the rows from MySQL as a list of dicts, without Redis. Raises pymysql.Error."""
    with mysql_connection() as connection, connection.cursor() as cursor:
        log.debug("MySQL: %s", sql)
        cursor.execute(sql, args)
        # A statement without rows can have made the session writable, such as SET SESSION
        # TRANSACTION READ WRITE. This error makes mysql_connection close the connection.
        if not cursor.description:  # it has no columns
            raise pymysql.ProgrammingError(f"not a query: {sql}")
        return list(cursor.fetchall())


def write(sql, args=None):
    """Run one INSERT, UPDATE, DELETE or REPLACE, and commit. Raises pymysql.Error.

    Returns the id of a new row (AUTO_INCREMENT), or None. After it, even if it has raised
    an error, invalidate the keys of the rows that it changes or inserts.
    """
    with mysql_connection() as connection, connection.cursor() as cursor:
        cursor.execute("START TRANSACTION READ WRITE")
        log.debug("MySQL: %s", sql)
        cursor.execute(sql, args)
        connection.commit()
        return cursor.lastrowid or None


# ---- Limits
#
# How old a result can be:
# - If rows change in MySQL, their result stays in Redis until its TTL is over, or until
#   invalidate removes it. save_planet does not remove the lists that fetch has cached.
# - A result can be as old as its TTL plus the time that its load took.
# - If a save cannot delete the old record, this process deletes it before its next look-up, and
#   keeps the key in memory until then. Other processes may return the old record meanwhile, at
#   most for its TTL.
# - The old record stays for its TTL if a process dies before invalidate, if Redis loses the
#   DELETE in a failover, or if MySQL commits a change after it has reported an error.
# - If DB_HOST leads to a replica, a reader may store an old record after invalidate.
#
# While Redis fails:
# - If it is out of reach or full, callers do not wait for one another. Each queries MySQL. But a
#   process runs at most MAX_CONNECTIONS queries at a time.
# - One reply that is later than REDIS_TIMEOUT pauses Redis for all keys. One node of a cluster
#   can cause that. Without the node in REDIS_URL, a cluster is not used.
# - While a cluster moves a key to another node, a save may be unable to delete it. After a move,
#   each thread that asks the old node makes a new client. With 100 threads, this took up to 2 s.
#   A user without the right for CLUSTER SLOTS makes a new client for each key of another node.
# - A result that takes longer than REDIS_TIMEOUT to send is not stored. Redis is not paused,
#   because redis-py reports this as a WatchError.
# - If the reply that gives a caller the lock is late, or if it fails to release the lock, the
#   others wait for LOCK_TTL.
# - If Redis grants locks, but a result cannot be stored, its callers load one after the other,
#   for up to MAX_WAIT.
# - The look-up of a host name can take longer than REDIS_TIMEOUT.
#
# While MySQL is slow:
# - A call that gets none of the MAX_CONNECTIONS within MYSQL_TIMEOUT raises an error.
# - If it hangs, a miss raises an error after 10 s (a ping, and a new connection). It can have
#   waited before: for another caller (MAX_WAIT), and for a free connection (MYSQL_TIMEOUT).
# - Callers that have waited for MAX_WAIT query MySQL at the same time.
# - The time limit that MySQL itself has is for SELECT. A write, or a stored procedure, can go on
#   after its call has raised an error. (MariaDB ends these, too.)
#
# If a signal handler raises an exception in the middle of a call (Ctrl-C, or the time limit of a
# job queue), it is best to end the process soon:
# - The lock may remain. Then the others wait for LOCK_TTL.
# - Very rarely, one of the MAX_CONNECTIONS is lost, another thread gets an error, or the process
#   crashes in hiredis.
#
# Rights:
# - Keys do not name the database or the program, and a value of another type is deleted. Give
#   each database a Redis of its own, or one of the numbered databases in Redis.
# - A stored procedure can change its session, which other callers use later: make it writable, or
#   leave a transaction open, which sees no later change. MariaDB's SET STATEMENT can make one
#   query writable. Give DB_USER only the rights it needs.

# ---- The demonstration

if __name__ == "__main__":
    slow = "SELECT SLEEP(0.05)"
    calls = [(fetch, slow), (fetch, slow), (planet, 1), (planet, 1)]
    try:
        # A miss, so that both servers are connected before times are taken.
        fetch("SELECT %s", (time.time(),))
        logging.basicConfig(format="    %(message)s", stream=sys.stdout)
        log.setLevel("DEBUG")
        for function, argument in calls:
            print(f"{function.__name__}({argument!r})")
            start = time.perf_counter()
            result = function(argument)
            print(f"    {1000 * (time.perf_counter() - start):.2f} ms: {result}")
    except pymysql.Error as error:
        sys.exit(f"MySQL: {error.args[-1]}; check the DB_ variables and load seed.sql")
