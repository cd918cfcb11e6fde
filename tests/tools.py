"""What makes a server slow, a crowd large and a hit visible.

Run as a program, it is one process of a crowd: see Worker.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pymysql
import redis
from servers import free_port

PROJECT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- questions


def wait_until(condition, seconds=10):
    """Wait for something to become true; how many seconds that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not happen"
        time.sleep(0.01)
    return time.monotonic() - start


def selects(db):
    """How many SELECTs MySQL has been asked, by everybody."""
    db.execute("SHOW GLOBAL STATUS LIKE 'Com_select'")
    return int(db.fetchone()[1])


def plain(server):
    """A plain client for a Redis."""
    return redis.Redis(port=server.port, password=server.password)


def plain_mysql(server):
    """A plain connection to a MySQL, which may write."""
    return pymysql.connect(
        host="127.0.0.1",
        port=server.port,
        user=server.user,
        password=server.password,
        database="tutorial",
        autocommit=True,
        # A transaction that the sample left open is a failure here, not a wait for ever.
        init_command="SET lock_wait_timeout = 3",
    )


def plant(cache, key, old="Mercury", new="Planted"):
    """Put into a cached answer what the database never held: who reads it, hits."""
    old, new = old.encode(), new.encode()
    if cache.type(key) == b"hash":
        fields = cache.hgetall(key).items()
        planted = {name: value.replace(old, new) for name, value in fields}
        assert planted != dict(fields)
        cache.hset(key, mapping=planted)
    else:
        planted = cache.get(key).replace(old, new)
        assert planted != cache.get(key)
        cache.set(key, planted, keepttl=True)


def warnings(caplog, module, *secrets):
    """What this module has warned of; none of it may hold a secret."""
    records = [record for record in caplog.records if record.name == module.__name__]
    for secret in secrets:
        assert secret and secret not in caplog.text
    assert all(record.levelname == "WARNING" for record in records)
    return [record.getMessage() for record in records]


class Sent:
    """The commands that clients send to a Redis meanwhile, without what scripts run."""

    def __init__(self, cache):
        self.cache = cache
        self.commands = []

    def __enter__(self):
        self.monitor = self.cache.monitor()
        self.monitor.__enter__()
        self.cache.echo("from here")  # after what connecting took
        return self

    def __exit__(self, *_):
        try:
            self.cache.echo("to here")
            while self.next() != "ECHO from here":
                pass
            while (command := self.next()) != "ECHO to here":
                self.commands.append(command.split()[0].upper())
        finally:
            self.monitor.__exit__(None, None, None)

    def next(self):
        while (entry := self.monitor.next_command())["client_type"] == "lua":
            pass
        return entry["command"]


# ---------------------------------------------------------------- threads, processes


def begin(function, *args):
    """Call in a new thread; a future, whose result(seconds) waits."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *args)
    pool.shutdown(wait=False)
    return future


class Worker:
    """Another process that has loaded the sample, and calls it in many threads.

    ask(…) returns at once; answers() waits and returns a dict for each thread:
    its answer or the name of its error, and its seconds since the common start.
    """

    def __init__(self, environment):
        paths = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__],
            env={**environment, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.process:
            self.process.kill()

    def ask(self, function, *args, threads=1, at=0, **constants):
        order = [function, args, threads, at or time.time(), constants]
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answers(self):
        return json.loads(self.process.stdout.readline())

    def answer(self, function, *args, **constants):
        self.ask(function, *args, **constants)
        (result,) = self.answers()
        return result["answer"]


def work():
    """Serve the orders that a Worker writes, one a line."""
    import example

    def call(function, args, at):
        time.sleep(max(0, at - time.time()))
        result = {}
        try:
            result["answer"] = getattr(example, function)(*args)
        except (pymysql.Error, redis.RedisError) as error:
            result["error"] = type(error).__name__
        result["seconds"] = time.time() - at
        return result

    for line in sys.stdin:
        function, args, threads, at, constants = json.loads(line)
        vars(example).update(constants)
        calls = [begin(call, function, args, at) for _ in range(threads)]
        print(json.dumps([call.result() for call in calls]), flush=True)


def start_crowd(workers, function, *args, threads=25):
    """Have all threads of all workers call at the same moment."""
    at = time.time() + 0.2  # by then all the threads are there
    for worker in workers:
        worker.ask(function, *args, threads=threads, at=at)
    time.sleep(0.2)


def outcomes(workers):
    return [result for worker in workers for result in worker.answers()]


# ---------------------------------------------------------------- the network


class Relay:
    """A TCP relay to a port of this machine, which may be changed.

    What clients have sent is in `sent`. Between hold() and release() it keeps to itself
    what the server replies, or what clients send, even if they break off meanwhile.
    `holding` is set as soon as there is something.
    """

    def __init__(self, target):
        self.target = target
        self.sent = bytearray()
        self.replies, self.requests = threading.Event(), threading.Event()
        self.holding = threading.Event()
        self.release()
        self.sockets = []
        self.threads = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def __enter__(self):
        self.run(self.accept)
        return self

    def __exit__(self, *_):
        self.release()
        end(self.listener)
        self.threads[0].join()  # after it there are no new ones
        self.cut()
        for thread in self.threads:
            thread.join()

    def hold(self, replies=True):
        self.holding.clear()
        (self.replies if replies else self.requests).clear()

    def release(self):
        self.replies.set()
        self.requests.set()

    def cut(self):
        """Break all connections."""
        for one in self.sockets:
            end(one)

    def run(self, function, *args):
        self.threads.append(threading.Thread(target=function, args=args, daemon=True))
        self.threads[-1].start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.sockets.append(client)
                try:
                    server = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    end(client)
                    continue
                self.sockets.append(server)
                self.run(self.pump, client, server, self.requests)
                self.run(self.pump, server, client, self.replies)

    def pump(self, source, drain, may_pass):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if may_pass is self.requests:
                    self.sent += data
                if not may_pass.is_set():
                    self.holding.set()
                    may_pass.wait()
                drain.sendall(data)
        end(source)
        end(drain)


def end(one):
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)  # close() alone does not wake who reads it
    one.close()


# ---------------------------------------------------------------- a cluster

SLOTS = [(0, 5460), (5461, 10922), (10923, 16383)]


def start_node(own, password, port=None):
    """A Redis that is ready to become part of a cluster."""
    # Its second port is by default 10000 above the first, where there is less peace.
    args = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    args += ["--cluster-config-file", "nodes", "--cluster-node-timeout", "1000"]
    return own.redis(*args, password=password, port=port)


def unite(nodes):
    """Make three of them one cluster. That takes Redis two seconds."""
    bus = nodes[0].args[3]
    for number, (node, slots) in enumerate(zip(nodes, SLOTS)):
        with plain(node) as client:
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            client.execute_command("CLUSTER ADDSLOTSRANGE", *slots)
            client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port, bus)
    for node in nodes:
        wait_until(lambda node=node: is_well(node))


def start_cluster(own):
    nodes = [start_node(own, "a-secret") for _ in SLOTS]
    unite(nodes)
    return nodes


def is_well(node):
    """Whether this node knows of three, and thinks that they serve all keys."""
    with plain(node) as client:
        info = client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == "3"


def holders(nodes, key):
    """The nodes that hold the key."""
    found = []
    for node in nodes:
        with plain(node) as client:
            if key.encode() in set(client.scan_iter()):
                found.append(node)
    return found


if __name__ == "__main__":
    work()
