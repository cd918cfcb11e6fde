"""tests/local runs a command beside its own servers, and leaves nothing behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pymysql
import pytest
from servers import START_TIMEOUT, ServerError, Servers
from tools import PROJECT, wait_until

LOCAL = [sys.executable, PROJECT / "tests" / "local"]
PYTHON = "{}.{}".format(*sys.version_info)
VENV = PROJECT / "tests" / ".venv" / PYTHON


def run(*command, project=PROJECT, env=(), **options):
    """Run tests/local to its end, and see that it leaves no file."""
    # Not tmp_path: with a path of that length, tests/local would not use it.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        result = subprocess.run(
            [sys.executable, project / "tests" / "local", *command],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TMPDIR": folder, **dict(env)},
            **options,
        )
        assert not list(Path(folder).glob("local-*"))
    return result


def is_open(port, host="127.0.0.1"):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, int(port))) == 0


@pytest.fixture
def copy(tmp_path):
    """A copy of the project, without its environment, in a folder with a space."""
    ignore = shutil.ignore_patterns(".*", "__pycache__")
    return Path(shutil.copytree(PROJECT, tmp_path / "my projects", ignore=ignore))


def test_the_command_has_its_own_input_output_and_exit_status():
    result = run("sh", "-c", "cat; exit 7", input="hello\n")
    assert (result.stdout, result.stderr, result.returncode) == ("hello\n", "", 7)


def test_a_command_that_a_signal_ended_has_the_exit_status_that_a_shell_reports():
    result = run("sh", "-c", "echo $DB_PORT; kill -KILL $$")
    assert result.returncode == 128 + signal.SIGKILL
    assert not is_open(result.stdout)


def test_a_mistake_in_the_command_is_one_line_and_has_its_own_exit_status():
    unknown, nothing = run("no such command"), run()
    assert (unknown.returncode, nothing.returncode) == (127, 2)
    assert unknown.stderr == "tests/local: command not found: no such command\n"
    assert nothing.stderr == "tests/local: usage: tests/local COMMAND [ARGUMENT ...]\n"


def test_the_command_finds_the_servers_the_seed_the_packages_and_the_project(copy):
    (copy / "tests" / ".venv").symlink_to(VENV.parent)
    env = {
        "DB_SSL_CA": "/of/another/server",
        "DB_HOST": "elsewhere",
        "PATH": os.defpath,
    }
    code = "import sys, example; print(sys.prefix, example.__file__, example.planet(3))"
    result = run("python", "-c", code, project=copy, cwd=copy.parent, env=env)
    assert result.stderr == ""
    assert result.stdout == f"{VENV} {copy}/example.py {{'id': 3, 'name': 'Earth'}}\n"


def test_packages_are_installed_again_only_if_the_requirements_change(copy):
    venv = copy.resolve() / "tests" / ".venv" / PYTHON
    venv.mkdir(parents=True)
    stamp = (VENV / "stamp").read_text().replace(str(VENV), str(venv))
    (venv / "stamp").write_text(stamp)
    result = run("no such command", project=copy)
    assert result.stderr == "tests/local: command not found: no such command\n"

    # If the installation fails, the environment does not count as complete.
    (copy / "requirements.txt").write_text("no-such-package-anywhere\n")
    result = run("true", project=copy, env={"PIP_NO_INDEX": "1"})
    assert result.returncode == 1
    assert "installing the Python packages failed; its output ends:" in result.stderr
    assert "No matching distribution found for no-such-package" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (venv / "stamp").exists()


def test_a_program_that_is_not_a_server_is_reported_in_one_line():
    result = run("true", env={"LOCAL_REDIS": "/no/such/redis"})
    assert result.returncode == 1
    assert result.stderr.startswith("tests/local: not a server: ")
    assert "/no/such/redis" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def started():
    """A Redis, a MySQL, and all command lines that were needed for them."""
    commands = []
    sys.addaudithook(
        lambda event, args: event == "subprocess.Popen" and commands.append(args[1])
    )
    with Servers() as servers:
        redis_server, mysql_server = servers.redis(), servers.mysql()
        mysql_server.client("CREATE DATABASE kept")
        yield redis_server, mysql_server, list(commands)


def test_nobody_gets_in_from_outside_or_without_a_password_or_sees_one(started):
    redis_server, mysql_server, commands = started
    for server in redis_server, mysql_server:
        assert is_open(server.port)
        assert not is_open(server.port, "127.0.0.2")
        assert len(server.password) == 32
        assert server.password not in str(commands)
    assert len(commands) >= 6
    assert redis_server.ask(b"KEYS *\r\n").startswith(b"-NOAUTH")
    with pytest.raises(pymysql.OperationalError, match="denied"):
        pymysql.connect(host="127.0.0.1", port=mysql_server.port, user="root")


def test_a_paused_server_hangs_until_it_is_resumed(started):
    for server in started[:2]:
        server.pause()
        assert is_open(server.port)
        assert not server.answers()
        server.resume()
        wait_until(server.answers)


def test_a_killed_server_starts_again_with_the_same_port_password_and_data(started):
    redis_server, mysql_server, _ = started
    before = redis_server.url, mysql_server.port, mysql_server.password
    for server in redis_server, mysql_server:
        server.kill()
        assert not is_open(server.port)
        server.start()
        assert is_open(server.port)
    assert (redis_server.url, mysql_server.port, mysql_server.password) == before
    assert "kept" in mysql_server.client("SHOW DATABASES")


def test_the_log_of_a_server_that_cannot_start_is_shown_soon():
    start = time.monotonic()
    with Servers() as servers, pytest.raises(ServerError) as error:
        servers.redis("--no-such-option", "1")
    assert time.monotonic() - start < START_TIMEOUT / 2
    first, *log = str(error.value).splitlines()
    assert "did not start; its log ends:" in first
    assert "no-such-option" in "\n".join(log)


POLITE = "trap 'echo told' INT TERM HUP"
WAIT = """
    redis_port=${REDIS_URL##*:}
    sleep 60 &
    echo $DB_PORT ${redis_port%/0}
    wait
"""
SIGNALS = [
    (number, POLITE) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
]
SIGNALS += [(signal.SIGTERM, "trap '' TERM"), (signal.SIGKILL, "")]


def test_a_signal_ends_the_command_and_its_children_and_the_servers():
    # They run at the same time, because each takes seconds.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, ExitStack() as end:
        running = []
        for number, first_line in SIGNALS:
            process = subprocess.Popen(
                [*LOCAL, "sh", "-c", first_line + WAIT],
                env={**os.environ, "TMPDIR": folder},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
            )
            end.callback(process.kill)
            running.append((number, first_line, process))
        ports = " ".join(process.stdout.readline() for *_, process in running).split()
        assert len(ports) == 2 * len(running)
        assert all(is_open(port) for port in ports)
        for number, _, process in running:
            process.send_signal(number)
        for number, first_line, process in running:
            # The pipe stays open as long as one of the command's processes runs.
            output, _ = process.communicate(timeout=20)
            assert output == ("told\n" if first_line == POLITE else "")
            killed = number == signal.SIGKILL
            assert process.returncode == (-number if killed else 128 + number)
        wait_until(lambda: not any(is_open(port) for port in ports))
        assert os.listdir(folder) == []


IN_A_TERMINAL = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
SURVIVE_CTRL_C = """
import os, redis, sys, time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # long enough for tests/local to end this, if it did
    print("Redis:", redis.Redis.from_url(os.environ["REDIS_URL"]).ping())
    sys.exit(5)
"""


def test_in_a_terminal_ctrl_c_belongs_to_the_command():
    command = [*LOCAL, "python", "-c", SURVIVE_CTRL_C]
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        while b"ready" not in process.stdout.readline():
            assert process.poll() is None
        process.stdin.write(b"\x03")
        assert b"Redis: True" in process.stdout.read()
        assert process.wait(20) == 5
