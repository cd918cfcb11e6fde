"""What several tests need: a crowd, a relay, a cluster, and what a call sends to Redis.

Run as a program, this file is one process of a crowd: see Worker.
"""

import contextlib
import json
import socket
import socketserver
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pymysql
import redis
from servers import free_port

PROJECT = Path(__file__).resolve().parent.parent
MERCURY = {"id": 1, "name": "Mercury"}  # the first planet of seed.sql


def wait_until(condition, seconds=10):
    """Wait until the condition is true. Return the seconds that this took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not happen"
        time.sleep(0.01)
    return time.monotonic() - start


def selects(db):
    """The number of SELECTs that MySQL has received from all its clients."""
    db.execute("SHOW GLOBAL STATUS LIKE 'Com_select'")
    return int(db.fetchone()[1])


def running(db, text):
    """How many queries with this text MySQL runs now."""
    processes = "SELECT id FROM information_schema.processlist WHERE info LIKE %s"
    return db.execute(f"{processes} AND id <> CONNECTION_ID()", (f"%{text}%",))


def plain(server):
    """A client of a Redis, without the sample."""
    return redis.Redis(port=server.port, password=server.password)


def plain_mysql(server):
    """A connection to a MySQL, without the sample. It may write."""
    address = {"host": "127.0.0.1", "port": server.port, "database": "tutorial"}
    login = {"user": server.user, "password": server.password}
    # A transaction that the sample left open is a failure here, not an endless wait.
    init = "SET lock_wait_timeout = 3"
    return pymysql.connect(**address, **login, autocommit=True, init_command=init)


def plant(cache, key, old="Mercury", new="Planted"):
    """Change a cached result to one that MySQL never held: only a hit returns it."""
    old, new = old.encode(), new.encode()
    if cache.type(key) == b"hash":
        fields = cache.hgetall(key)
        planted = {name: text.replace(old, new) for name, text in fields.items()}
        assert planted != fields
        cache.hset(key, mapping=planted)
    else:
        text = cache.get(key)
        assert old in text
        cache.set(key, text.replace(old, new), keepttl=True)


def warnings(caplog, module, *secrets):
    """The warnings of this module. It logs nothing else, and none of the secrets."""
    records = [record for record in caplog.records if record.name == module.__name__]
    assert all(secret and secret not in caplog.text for secret in secrets)
    assert all(record.levelname == "WARNING" for record in records)
    return [record.getMessage() for record in records]


@contextlib.contextmanager
def Sent(cache):
    """In `commands`: what clients send to a Redis, without what scripts run."""
    sent = SimpleNamespace(commands=[])
    with cache.monitor() as monitor:
        cache.echo("start")  # before it come the commands of connecting
        yield sent
        cache.echo("end")
        entries = (e["command"] for e in monitor.listen() if e["client_type"] != "lua")
        commands = list(iter(lambda: next(entries), "ECHO end"))
    for command in commands[commands.index("ECHO start") + 1 :]:
        sent.commands.append(command.split()[0].upper())


def begin(function, *args):
    """Call in a new thread. Return a future, whose result(seconds) waits."""
    return ThreadPoolExecutor(1).submit(function, *args)


class Worker:
    """Another process that has loaded the sample, and calls it in many threads.

    ask() returns at once. answers() waits, and returns a dict for each thread: its
    "answer" or the name of its "error", and its "seconds" since the common start.
    """

    def __init__(self, environment):
        command = [sys.executable, "-W", "error", __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.process:
            self.process.kill()

    def ask(self, function, *args, threads=1, at=0):
        order = [function, args, threads, at or time.time()]
        print(json.dumps(order), file=self.process.stdin, flush=True)

    def answers(self):
        return json.loads(self.process.stdout.readline())

    def answer(self, function, *args):
        self.ask(function, *args)
        (result,) = self.answers()
        return result["answer"]


def work():
    """Carry out the orders that a Worker writes, one a line."""
    sys.path.append(str(PROJECT))
    import example

    def call(function, args, at):
        time.sleep(max(0, at - time.time()))
        try:
            result = {"answer": getattr(example, function)(*args)}
        except (pymysql.Error, redis.RedisError) as error:
            result = {"error": type(error).__name__}
        return {**result, "seconds": time.time() - at}

    for line in sys.stdin:
        function, args, threads, at = json.loads(line)
        calls = [begin(call, function, args, at) for _ in range(threads)]
        print(json.dumps([call.result() for call in calls]), flush=True)


def start_crowd(workers, function, *args, threads=25):
    """Make all threads of all workers call at the same moment."""
    at = time.time() + 0.2  # by then all threads are running
    for worker in workers:
        worker.ask(function, *args, threads=threads, at=at)
    time.sleep(0.2)


def outcomes(workers):
    return [result for worker in workers for result in worker.answers()]


class Relay(socketserver.ThreadingTCPServer):
    """A TCP relay to a port of this machine, `target`, which may be changed.

    `sent` is what clients have sent. Between hold() and release() the relay keeps the
    server's replies, or the clients' requests, even if these disconnect meanwhile.
    `holding` is set when it has something to keep.
    """

    request_queue_size = 100

    def __init__(self, target):
        super().__init__(("127.0.0.1", 0), None)
        self.target, self.port = target, self.server_address[1]
        self.sent, self.clients = bytearray(), []
        self.replies, self.requests, self.holding = [threading.Event() for _ in "123"]
        self.release()
        begin(self.serve_forever, 0.01)

    def __exit__(self, *_):
        self.release()
        self.shutdown()  # after it there are no new clients
        self.cut()
        self.server_close()  # waits for the threads

    def hold(self, replies=True):
        self.holding.clear()
        (self.replies if replies else self.requests).clear()

    def release(self):
        self.replies.set()
        self.requests.set()

    def cut(self):
        """Break all connections."""
        for client in self.clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def process_request(self, client, address):
        self.clients.append(client)
        super().process_request(client, address)  # calls finish_request in a thread

    def finish_request(self, client, _):
        with contextlib.suppress(OSError), socket.socket() as server:
            server.connect(("127.0.0.1", self.target))
            requests = begin(self.pump, client, server, self.requests)
            self.pump(server, client, self.replies)
            requests.result()

    def pump(self, source, drain, may_pass):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if may_pass is self.requests:
                    self.sent += data
                if not may_pass.is_set():
                    self.holding.set()
                    may_pass.wait()
                drain.sendall(data)
        with contextlib.suppress(OSError):
            drain.shutdown(socket.SHUT_RDWR)


def shorten_timeouts(module):
    """Shorten MYSQL_TIMEOUT, PyMySQL's timeouts, and MySQL's own, to half a second."""
    options = module.MYSQL_OPTIONS
    for name in "connect_timeout", "read_timeout", "write_timeout":
        assert options[name] == module.MYSQL_TIMEOUT == 5
        options[name] = 0.5
    own = options["init_command"]
    assert "max_execution_time = 4900" in own and "max_statement_time = 4.9" in own
    options["init_command"] = own.replace("4900", "400").replace("4.9", "0.4")
    module.MYSQL_TIMEOUT = 0.5
    module.idle_connections.clear()


def is_paused(module):
    return time.monotonic() < module.paused_until


def start_cluster(own):
    """A cluster of three Redis servers. It takes two seconds."""
    args = ["--cluster-enabled", "yes", "--cluster-config-file", "nodes"]
    # The default of the second port, 10000 above the first, is often not free.
    args += ["--cluster-node-timeout", "1000", "--cluster-port"]
    nodes = []
    for slots in (0, 5460), (5461, 10922), (10923, 16383):
        nodes.append(own.redis(*args, free_port(), password="a-secret"))
        run = plain(nodes[-1]).execute_command
        run("CLUSTER SET-CONFIG-EPOCH", len(nodes))
        run("CLUSTER ADDSLOTSRANGE", *slots)
        run("CLUSTER MEET", "127.0.0.1", nodes[0].port, nodes[0].args[-1])
    wait_until(lambda: all(map(is_well, nodes)))
    return nodes


def is_well(node):
    """Whether this node knows all three, and finds that they serve all keys."""
    info = plain(node).execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == "3"


def holders(nodes, key):
    """The nodes that hold the key, which has no wildcards in it."""
    return [node for node in nodes if plain(node).keys(key)]


if __name__ == "__main__":
    work()
