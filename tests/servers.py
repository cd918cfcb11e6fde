"""Throw-away Redis and MySQL servers on free ports of 127.0.0.1.

    with Servers() as servers:
        redis, mysql = servers.redis(), servers.mysql()
        subprocess.run(["python", "example.py"], env=servers.environment(redis, mysql))

All their files are in one temporary folder. At the end of the block the servers are
killed and the folder is removed, even if the program itself was killed by then.
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

# Each process first adds its group to the list, and then becomes the command. So no
# process is ever missing from the list. The minus sign tells kill that it is a group.
LAUNCH = ': >"$0/running/-$$" && exec "$@"'

# This shell waits for a line. If the program is killed, its end of the pipe closes, and
# the shell does not wait any longer.
CLEAN_UP = """
    read -r line
    mv "$0/running" "$0/ended"  # from now on no process can start
    kill -s KILL -- $(ls "$0/ended")
    rm -rf "$0" || { sleep 1; rm -rf "$0"; }  # a dying server can still write a file
"""


class ServerError(Exception):
    """A server is not installed or did not start; the text says why."""


def find(*names):
    """The path of the first of these programs that is installed, or None."""
    # mysqld is often in a folder that only root's PATH has, or none (Fedora).
    folders = "/usr/sbin:/usr/local/sbin:/usr/libexec:/usr/local/bin:/opt/homebrew/bin"
    path = os.environ.get("PATH", os.defpath) + ":" + folders
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def find_program(kind):
    """The program that LOCAL_REDIS or LOCAL_MYSQLD names, or one that is installed."""
    return os.environ.get(f"LOCAL_{kind.upper()}") or find(*PROGRAMS[kind])


def find_server(kind, *options):
    """The path of a server program, and its version, such as "Redis 8.0.1"."""
    program = find_program(kind) or PROGRAMS[kind][0]
    # redis-check-rdb is the server if it is called by any other name.
    command = ["server", *options, "--version"]
    try:
        text = subprocess.check_output(command, executable=program, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ServerError(f"not a server: {error}") from None
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


def launch(folder, command, **options):
    """Start a process that the Servers of this folder end, and its group if it leads one."""
    return subprocess.Popen(["sh", "-c", LAUNCH, folder, *command], **options)


class Server:
    """One server process. `kill` and `start` keep its port, password and data."""

    def __init__(self, folder, args, port, password=None):
        self.folder, self.log, self.socket = folder, folder / "log", folder / "socket"
        self.args = [str(arg) for arg in args]
        self.port = port or free_port()
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
            self.process = launch(
                self.folder.parent,
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is not meant for the servers
            )

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
        self.process.kill()
        self.process.wait()
        # The system can give this number to another process from now on.
        listed = self.folder.parent / "running" / f"-{self.process.pid}"
        listed.unlink(missing_ok=True)

    def pause(self):
        """Make the server hang: it accepts connections but never replies."""
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # until it has stopped

    def resume(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def fail(self):
        self.kill()
        text = self.log.read_text(errors="replace")
        hint = " (does AppArmor confine it?)" if "denied" in text else ""
        tail = "\n".join(text.splitlines()[-15:])
        raise ServerError(f"{self.version} did not start{hint}; its log ends:\n{tail}")


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
        self.kill()  # it has ended; this takes it off the list
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
        result = subprocess.run(
            [find_program("mysql"), f"--defaults-file={self.config}"],
            input=sql,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if result.returncode:
            raise ServerError(f"mysql: {result.stderr.strip()}")
        return result.stdout


class Servers:
    """A temporary folder with servers in it, as a context manager."""

    def __enter__(self):
        base = tempfile.gettempdir()
        # The path of a socket file can have about a hundred bytes, and
        # mariadb-install-db fails if there is a space in it.
        base = base if re.fullmatch(r"\S{1,60}", base) else "/tmp"
        self.folder = Path(tempfile.mkdtemp(prefix="local-", dir=base))
        (self.folder / "running").mkdir()
        self.started = []
        self.cleaner = subprocess.Popen(
            ["sh", "-c", CLEAN_UP, self.folder],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_):
        self.cleaner.communicate(b"\n")
        for server in self.started:
            server.process.wait()

    def redis(self, *args, port=None, password=None):
        return self.add(Redis, args, port, password)

    def mysql(self, *args, port=None):
        return self.add(MySQL, args, port)

    def add(self, kind, *args):
        server = kind(Path(tempfile.mkdtemp(dir=self.folder)), *args)
        self.started.append(server)
        return server

    def environment(self, redis, mysql):
        """The whole environment of a command that uses these servers."""
        environment = dict(os.environ, REDIS_URL=redis.url, DB_NAME="tutorial")
        environment.update(DB_HOST="127.0.0.1", DB_PORT=str(mysql.port))
        environment.update(DB_USER=mysql.user, DB_PASS=mysql.password)
        # With the CA of another database, this one would be refused.
        environment.pop("DB_SSL_CA", None)
        return environment
