"""Throw-away Redis and MySQL servers on free ports of 127.0.0.1.

    with Servers() as servers:
        redis, mysql = servers.redis(), servers.mysql()
        subprocess.run(["python", "example.py"], env=servers.environment(redis, mysql))

All they write is in one temporary folder.
Servers and folder are gone afterwards, however the program that wanted them ended.
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
import sys
import tempfile
import time
from pathlib import Path

START_TIMEOUT = 60  # seconds; MySQL on a slow disk needs ten for its first start


class ServerError(Exception):
    """A server is not installed or did not start; the text says why."""


# ---------------------------------------------------------------- programs


def find(*names):
    """The first of these programs that is installed, or None."""
    # mysqld is often where only root's PATH leads, or in none at all (Fedora).
    folders = "/usr/sbin:/usr/local/sbin:/usr/libexec:/usr/local/bin:/opt/homebrew/bin"
    path = os.environ.get("PATH", os.defpath) + ":" + folders
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def find_redis():
    # Debian's redis-tools has the server, but under its other name only.
    names = "redis-server", "valkey-server", "redis-check-rdb", "valkey-check-rdb"
    return os.environ.get("LOCAL_REDIS") or find(*names)


def find_mysqld():
    return os.environ.get("LOCAL_MYSQLD") or find("mysqld", "mariadbd")


def find_client():
    return find("mysql", "mariadb")


def version(*command):
    try:
        printed = subprocess.check_output([*command, "--version"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ServerError(f"not a server: {error}") from None
    return printed.strip()


def is_free(port):
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


def free_port():
    # Above 32767 the kernel picks the ports of outgoing connections: one of them
    # could take the port of a server that a test has just killed.
    # Redis Cluster needs a second port, 10000 above.
    return next(filter(is_free, (random.randint(15000, 32000) for _ in range(1000))))


# ---------------------------------------------------------------- servers


class Server:
    """One server process. `kill` and `start` keep its port, password and data."""

    def __init__(self, folder, args, port):
        self.folder = folder
        self.args = [str(arg) for arg in args]
        self.log = folder / "log"
        self.socket = folder / "socket"
        self.process = None
        self.port = port or free_port()
        self.prepare()
        while True:
            try:
                self.start()
                break
            except ServerError:
                # Did somebody else take the port since it was free?
                if port or is_free(self.port):
                    raise
                self.port = free_port()

    @property
    def pid(self):
        return self.process.pid

    def start(self):
        """Start the server and wait until it answers."""
        self.launch(*self.command())
        deadline = time.monotonic() + START_TIMEOUT
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.fail()
            time.sleep(0.02)

    def kill(self):
        """End the server as a power cut would."""
        if self.process:
            self.process.kill()
            self.process.wait()
            # The system may soon give this number to another process.
            (self.folder.parent / "pids" / str(self.pid)).unlink(missing_ok=True)

    def pause(self):
        """Make the server hang: it accepts connections but never answers."""
        os.kill(self.pid, signal.SIGSTOP)
        # The signal may still be under way when kill() returns.
        os.waitpid(self.pid, os.WUNTRACED)

    def resume(self):
        os.kill(self.pid, signal.SIGCONT)

    def launch(self, *command):
        with open(self.log, "wb") as log:
            self.process = launch(
                self.folder.parent,
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C is meant for the test, not for its servers.
                start_new_session=True,
            )

    def ask(self, question):
        # By the socket file, not the port: that can only be this very server, and
        # it works the same when the port speaks TLS.
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            try:
                connection.connect(str(self.socket))
                connection.sendall(question)
                return connection.recv(100)
            except OSError:
                return b""

    def fail(self):
        self.kill()
        text = self.log.read_text(errors="replace")
        hint = ""
        if "denied" in text:
            hint = " (does AppArmor confine it to its own folders?)"
        tail = "\n".join(text.splitlines()[-15:]) or "(nothing)"
        raise ServerError(f"{self.version} did not start{hint}; its log ends:\n{tail}")


class Redis(Server):
    def __init__(self, folder, args, port, password):
        self.password = secrets.token_hex(16) if password is None else password
        super().__init__(folder, args, port)

    @property
    def url(self):
        login = f"default:{self.password}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    def prepare(self):
        self.program = find_redis()
        if not self.program:
            raise ServerError("no redis-server or valkey-server is installed")
        if "check-rdb" in self.program:
            # It is the server, too: it goes by the name that it is called by.
            server = self.folder / "redis-server"
            server.symlink_to(self.program)
            self.program = server
        text = version(self.program)
        name = re.search(r"(\w+) server v=([\d.]+)", text)
        self.version = " ".join(name.groups()) if name else text
        # In a file, because everybody can read the command lines of a machine.
        self.config = private_file(self.folder / "config")
        if self.password:
            self.config.write_text(f"requirepass {self.password}\n")

    def command(self):
        return [
            *[self.program, self.config],
            *["--bind", "127.0.0.1", "--port", str(self.port)],
            *["--unixsocket", self.socket, "--dir", self.folder],
            *["--save", "", "--appendonly", "no"],
            *self.args,
        ]

    def answers(self):
        answer = self.ask(b"PING\r\n")
        return bool(answer) and not answer.startswith(b"-LOADING")


class MySQL(Server):
    user = "root"

    def __init__(self, folder, args, port):
        self.password = secrets.token_hex(16)
        super().__init__(folder, args, port)

    def prepare(self):
        self.program = find_mysqld()
        if not self.program:
            raise ServerError("no mysqld or mariadbd is installed")
        text = version(self.program, "--no-defaults")
        name = re.search(r"Ver ([\d.]+)", text)
        product = "MariaDB" if "MariaDB" in text else "MySQL"
        self.version = f"{product} {name[1]}" if name else text

        # 8 MB of redo log instead of 100. What a server does not know, it skips.
        self.options = [
            f"--datadir={self.folder / 'data'}",
            f"--tmpdir={self.folder}",
            "--loose-innodb-log-file-size=8M",
            "--loose-innodb-redo-log-capacity=8M",
        ]
        if product == "MariaDB":
            install = find("mariadb-install-db", "mysql_install_db")
            if not install:
                raise ServerError("no mariadb-install-db is installed")
            # Without this method there would be more accounts, with no password.
            create = [install, "--no-defaults", "--skip-test-db"]
            create += ["--auth-root-authentication-method=socket"]
            create += ["--auth-root-socket-user=root"]
        else:
            create = [self.program, "--no-defaults", *as_root()]
            create += ["--initialize-insecure"]
        self.launch(*create, *self.options)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(START_TIMEOUT)
        if self.process.returncode != 0:
            self.fail()
        self.kill()  # it has ended: no more than taken off the list

        # The server runs this before it lets anybody in.
        self.init = private_file(self.folder / "init.sql")
        self.init.write_text(
            f"ALTER USER 'root'@'localhost' IDENTIFIED BY '{self.password}';\n"
        )
        self.login = private_file(self.folder / "login")
        self.login.write_text(
            f"[client]\nuser=root\npassword={self.password}\nsocket={self.socket}\n"
        )

    def command(self):
        return [
            *[self.program, "--no-defaults", *as_root(), *self.options],
            *["--bind-address=127.0.0.1", f"--port={self.port}"],
            *[f"--socket={self.socket}", f"--init-file={self.init}"],
            # A distribution's own folder for it may be closed to us: no start.
            f"--secure-file-priv={self.folder}",
            # MySQL would listen on a second port, the same one for every server.
            *["--loose-skip-log-bin", "--loose-mysqlx=OFF"],
            *self.args,
        ]

    def answers(self):
        return bool(self.ask(b""))  # the server speaks first

    def client(self, sql):
        """What the mysql command prints for SQL text or for a file of it."""
        if isinstance(sql, Path):
            sql = sql.read_text(encoding="utf-8")
        result = subprocess.run(
            [find_client() or "mysql", f"--defaults-file={self.login}"],
            input=sql,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if result.returncode:
            raise ServerError(f"mysql: {result.stderr.strip()}")
        return result.stdout


def as_root():
    """What mysqld must be told before it agrees to run as root."""
    # mariadb-install-db is not told: it would change files of the system for it.
    return ["--user=root"] if os.geteuid() == 0 else []


def private_file(path):
    path.touch(mode=0o600)
    return path


# ---------------------------------------------------------------- all of them


class Servers:
    """A temporary folder with servers in it, as a context manager."""

    def __enter__(self):
        base = tempfile.gettempdir()
        # The name of a socket file can have no more than about a hundred bytes.
        if len(os.fsencode(base)) > 60:
            base = "/tmp"
        self.folder = Path(tempfile.mkdtemp(prefix="local-", dir=base))
        (self.folder / "pids").mkdir()
        self.owner = os.getpid()
        self.started = []
        # It cleans up when this process could not: SIGKILL, a crash, a closed terminal.
        self.watcher = subprocess.Popen(
            [sys.executable, "-I", __file__, self.folder, str(self.owner)],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_):
        if os.getpid() != self.owner:
            return  # a fork of the owner: the servers are not its own
        for server in self.started:
            server.kill()
        clean_up(self.folder)
        self.watcher.kill()
        self.watcher.wait()

    def redis(self, *args, port=None, password=None):
        return self.add(Redis(self.subfolder("redis-"), args, port, password))

    def mysql(self, *args, port=None):
        return self.add(MySQL(self.subfolder("mysql-"), args, port))

    def add(self, server):
        self.started.append(server)
        return server

    def subfolder(self, prefix):
        return Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder))

    def environment(self, redis, mysql):
        """The whole environment of a command that shall use these servers."""
        environment = {
            **os.environ,
            "REDIS_URL": redis.url,
            "DB_HOST": "127.0.0.1",
            "DB_PORT": str(mysql.port),
            "DB_USER": mysql.user,
            "DB_PASS": mysql.password,
            "DB_NAME": "tutorial",
        }
        # The CA of somebody's real database would refuse this one.
        environment.pop("DB_SSL_CA", None)
        return environment


def launch(folder, command, **options):
    """Start a process that clean_up(folder) will end, if it leads its own group."""
    # The process lists itself and only then becomes the command, so that there is
    # never one that runs and is not listed.
    script = ': >"$0/$$" && exec "$@"'
    return subprocess.Popen(["sh", "-c", script, folder / "pids", *command], **options)


def clean_up(folder):
    """End every process that is listed in the folder, and remove the folder."""
    # Once the list is renamed no process can list itself, and so none can start.
    ended = folder / "ended"
    with contextlib.suppress(FileNotFoundError):
        (folder / "pids").rename(ended)
    for entry in ended.glob("*"):
        # With the whole group, for mariadb-install-db has children.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(int(entry.name), signal.SIGKILL)
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.1)  # a dying server still wrote a file


def watch(folder, owner):
    """Clean up after the owner, this process's parent, once it is no more."""
    # Not by waiting for the end of a pipe: any fork of the owner would keep it open.
    while os.getppid() == owner:
        time.sleep(0.2)
    clean_up(folder)


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]))
