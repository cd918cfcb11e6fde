"""Throw-away Redis and MySQL servers on free ports of 127.0.0.1.

    with Servers() as servers:
        redis, mysql = servers.redis(), servers.mysql()
        subprocess.run(["python", "example.py"], env=servers.environment(redis, mysql))

All their files are in one temporary folder. At the end of the block the servers are
killed and the folder is removed.
"""

import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

START_TIMEOUT = 60  # seconds; on a slow disk the first start of MySQL takes ten

PROGRAMS = {
    # In Debian's redis-tools the server is there only as redis-check-rdb.
    "redis": ["redis-server", "valkey-server", "redis-check-rdb", "valkey-check-rdb"],
    "mysqld": ["mysqld", "mariadbd"],
    "mysql": ["mysql", "mariadb"],
}
AS_ROOT = ["--user=root"] if os.geteuid() == 0 else []  # or mysqld refuses to run

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]  # they end a program


class ServerError(Exception):
    """A server did not start. The text says why."""


def find(*names):
    """The path of the first of these programs that is installed, or None."""
    # mysqld is often in a folder that only root's PATH has, or none (Fedora).
    folders = "/usr/sbin:/usr/local/sbin:/usr/libexec:/usr/local/bin:/opt/homebrew/bin"
    path = os.environ.get("PATH", os.defpath) + ":" + folders
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def find_program(kind):
    """The program that LOCAL_REDIS or LOCAL_MYSQLD names, or one that is installed."""
    named = os.environ.get(f"LOCAL_{kind.upper()}")
    return find(*([named] if named else PROGRAMS[kind])) or named


def find_server(kind, *options):
    """The path of a server program, and its version, such as "Redis 8.0.1"."""
    program = find_program(kind) or PROGRAMS[kind][0]
    # redis-check-rdb is the server if it is called by any other name.
    command = [kind, *options, "--version"]
    text = subprocess.check_output(command, executable=program, text=True)
    names = [name for name in ("Redis", "Valkey", "MariaDB") if name in text]
    number = re.search(r"(?:v=|Ver )([\d.]+)", text)
    return program, f"{(*names, 'MySQL')[0]} {number[1] if number else text.strip()}"


def free_port():
    # From 32768 on the kernel uses ports for outgoing connections. One of them could
    # take the port of a server that a test has just killed.
    while True:
        port = random.randint(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """One server process. `kill` and `start` keep its port, password and data."""

    def __init__(self, servers, args, password=None):
        self.servers = servers
        self.folder = folder = Path(tempfile.mkdtemp(dir=servers.folder))
        self.log, self.socket = folder / "log", folder / "socket"
        self.args = [str(arg) for arg in args]
        self.port = free_port()
        self.password = secrets.token_hex(16) if password is None else password
        # In a file, because every user of a machine can read its command lines.
        self.config = folder / "config"
        self.config.write_text(self.CONFIG.format(**vars(self)))
        self.prepare()
        self.start()

    def start(self):
        """Start the server and wait until it replies."""
        self.launch(*self.command())
        deadline = time.monotonic() + START_TIMEOUT
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.fail()
            time.sleep(0.02)

    def launch(self, *command):
        with open(self.log, "wb") as log:
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            # In a session of its own, because Ctrl-C is not meant for the servers.
            options["start_new_session"] = True
            self.process = self.servers.launch(command, **options)

    def answers(self):
        # MySQL sends the first message. Redis can reply that a password is needed.
        reply = self.ask(b"PING\r\n")
        return bool(reply) and not reply.startswith(b"-LOADING")

    def ask(self, request):
        """The first bytes that the server sends, or none."""
        # The socket file can only be this server's, and needs no TLS.
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            try:
                connection.connect(str(self.socket))
                connection.sendall(request)
                return connection.recv(100)
            except OSError:
                return b""

    def kill(self):
        """End the server as a power cut would."""
        self.servers.kill(self.process)

    def pause(self):
        """Make the server hang: it accepts connections but never replies."""
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # until it has stopped

    def resume(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def fail(self):
        self.kill()
        text = self.log.read_text(errors="replace")
        tail = "\n".join(text.splitlines()[-15:])
        raise ServerError(f"{self.version} did not start; its log ends:\n{tail}")


class Redis(Server):
    CONFIG = """
        bind 127.0.0.1
        port {port}
        requirepass "{password}"
        unixsocket "{socket}"
        dir "{folder}"
        save ""
    """

    @property
    def url(self):
        login = f"default:{self.password}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    def prepare(self):
        program, self.version = find_server("redis")
        self.program = self.folder / "redis-server"
        self.program.symlink_to(program)

    def command(self):
        return [self.program, self.config, *self.args]


class MySQL(Server):
    # Options that only MySQL or only MariaDB knows begin with "loose". MySQL's mysqlx
    # would be a second port, the same for all servers.
    CONFIG = """
        [client]
        user = root
        password = {password}
        socket = "{socket}"

        [mysqld]
        bind-address = 127.0.0.1
        port = {port}
        socket = "{socket}"
        datadir = "{folder}/data"
        tmpdir = "{folder}"
        secure-file-priv = "{folder}"
        loose-innodb-log-file-size = 8M
        loose-innodb-redo-log-capacity = 8M
        loose-skip-log-bin
        loose-mysqlx = OFF
    """
    user = "root"

    def prepare(self):
        self.program, self.version = find_server("mysqld", "--no-defaults")
        options = [f"--defaults-file={self.config}"]
        create = [self.program, *options, *AS_ROOT, "--initialize-insecure"]
        if "MariaDB" in self.version:
            install = find("mariadb-install-db", "mysql_install_db")
            # By default it makes more accounts, which have no password.
            options += ["--auth-root-authentication-method=socket"]
            options += ["--auth-root-socket-user=root", "--skip-test-db"]
            # A bare container has no /etc/hosts; without --force this would matter.
            create = [install or "mariadb-install-db", *options, "--force"]
        self.launch(*create)
        if self.process.wait():
            self.fail()
        self.kill()  # what is left of its group
        # The server runs this file before it accepts connections.
        self.init = self.folder / "init.sql"
        account = f"'root'@'localhost' IDENTIFIED BY '{self.password}'"
        self.init.write_text(f"ALTER USER {account};\n")

    def command(self):
        options = [f"--defaults-file={self.config}", *AS_ROOT]
        return [self.program, *options, f"--init-file={self.init}", *self.args]

    def client(self, sql):
        """What the mysql command prints for SQL text or for a file of it."""
        if isinstance(sql, Path):
            sql = sql.read_text(encoding="utf-8")
        command = [find_program("mysql"), f"--defaults-file={self.config}"]
        return subprocess.check_output(command, input=sql, encoding="utf-8")


class Servers:
    """A temporary folder with servers in it, as a context manager."""

    def __enter__(self):
        base = tempfile.gettempdir()
        # The path of a socket file can have about a hundred bytes, and
        # mariadb-install-db fails if there is a space in it.
        base = base if re.fullmatch(r"\S{1,60}", base) else "/tmp"
        self.folder = Path(tempfile.mkdtemp(prefix="local-", dir=base))
        self.processes = set()
        return self

    def __exit__(self, *_):
        # Another Ctrl-C must not stop this.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for process in list(self.processes):
                self.kill(process)
            shutil.rmtree(self.folder)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def launch(self, command, **options):
        """Start a process that ends with the servers."""
        process = subprocess.Popen(command, **options)
        self.processes.add(process)
        return process

    def kill(self, process):
        """End a process and, if it leads a group, all of the group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        # From now on, another process can get its number.
        self.processes.discard(process)

    def redis(self, *args, password=None):
        return Redis(self, args, password)

    def mysql(self, *args):
        return MySQL(self, args)

    def environment(self, redis, mysql):
        """The whole environment of a command that uses these servers."""
        environment = dict(os.environ, REDIS_URL=redis.url, DB_NAME="tutorial")
        environment.update(DB_HOST="127.0.0.1", DB_PORT=str(mysql.port))
        environment.update(DB_USER=mysql.user, DB_PASS=mysql.password)
        # With the CA of another database, this one would be refused.
        environment.pop("DB_SSL_CA", None)
        return environment
