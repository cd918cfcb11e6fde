"""tests/local runs a command beside its own servers, and leaves nothing behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pymysql
import pytest
from servers import Servers
from tools import PROJECT

LOCAL = [sys.executable, PROJECT / "tests" / "local"]
PYTHON = "{}.{}".format(*sys.version_info)
VENV = PROJECT / "tests" / ".venv" / PYTHON


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    """Where tests/local has its files. Every test checks that it leaves none."""
    # Not tmp_path: with a path of that length, tests/local would not use it.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield
        assert not list(Path(folder).glob("local-*"))


def run(*command, project=PROJECT, **options):
    """Run tests/local to its end."""
    options.update(capture_output=True, text=True)
    command = [sys.executable, project / "tests" / "local", *command]
    return subprocess.run(command, check=False, **options)


def is_open(port, host="127.0.0.1"):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize(
    ("end", "status"), [("exit 7", 7), ("kill -KILL $$", 128 + signal.SIGKILL)]
)
def test_the_command_has_its_own_input_output_and_exit_status(end, status):
    result = run("sh", "-c", f"cat; echo $DB_PORT; sleep 60 & {end}", input="hello\n")
    hello, port = result.stdout.split()
    assert (hello, result.stderr, result.returncode) == ("hello", "", status)
    assert not is_open(port)


def test_bash_does_not_read_bashrc_which_can_put_another_python_first(
    tmp_path, monkeypatch
):
    # A bash that prints its arguments. The real one reads the file only at a terminal.
    (tmp_path / "bash").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bash").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert run("bash").stdout == "--norc\n"


def test_a_mistake_is_one_line_and_has_its_own_exit_status():
    unknown, nothing = run("no such command"), run()
    assert (unknown.returncode, nothing.returncode) == (127, 2)
    assert unknown.stderr == "tests/local: command not found: no such command\n"
    assert nothing.stderr == "tests/local: usage: tests/local COMMAND [ARGUMENT ...]\n"


def test_the_command_finds_servers_seed_packages_and_project(tmp_path, monkeypatch):
    ignore = shutil.ignore_patterns(".*", "__pycache__")
    copy = Path(shutil.copytree(PROJECT, tmp_path / "my projects", ignore=ignore))
    (copy / "tests" / ".venv").symlink_to(VENV.parent)
    monkeypatch.setenv("DB_SSL_CA", "/of/another/server")
    monkeypatch.setenv("DB_HOST", "elsewhere")
    monkeypatch.setenv("PATH", os.defpath)
    code = "import sys, example; print(sys.prefix, example.__file__, example.planet(3))"
    result = run("python", "-c", code, project=copy, cwd=copy.parent)
    assert result.stderr == ""
    assert result.stdout == f"{VENV} {copy}/example.py {{'id': 3, 'name': 'Earth'}}\n"


def test_nobody_gets_in_from_outside_or_without_a_password():
    with Servers() as servers:
        redis_server, mysql_server = servers.redis(), servers.mysql()
        for server in redis_server, mysql_server:
            assert is_open(server.port)
            assert not is_open(server.port, "127.0.0.2")
            assert len(server.password) == 32
        assert redis_server.ask(b"KEYS *\r\n").startswith(b"-NOAUTH")
        with pytest.raises(pymysql.OperationalError, match="denied"):
            pymysql.connect(host="127.0.0.1", port=mysql_server.port, user="root")


SAY = "echo told"
IGNORE = ""
WAIT = """
    sleep 60 &
    sleep 0.2  # until tests/local waits for this command
    echo $DB_PORT ${REDIS_URL##*:}
    wait
"""


@pytest.mark.parametrize(
    ("name", "trap"), [("INT", SAY), ("HUP", SAY), ("TERM", SAY), ("TERM", IGNORE)]
)
def test_a_signal_ends_the_command_its_children_and_the_servers(name, trap):
    number = signal.Signals[f"SIG{name}"]
    process = subprocess.Popen(
        [*LOCAL, "sh", "-c", f"trap '{trap}' {name}\n{WAIT}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    ports = process.stdout.readline().removesuffix("/0\n").split()
    assert [is_open(port) for port in ports] == [True, True]
    process.send_signal(number)
    # The pipe stays open as long as one of the command's processes runs.
    output, _ = process.communicate(timeout=20)
    assert output == ("told\n" if trap == SAY else "")
    assert process.returncode == 128 + number
    assert [is_open(port) for port in ports] == [False, False]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_pytest_leaves_no_servers_if_a_signal_ends_it(name, tmp_path, monkeypatch):
    file = tmp_path / "test_end.py"
    file.write_text(f"import os, signal\ntest = lambda: os.kill(0, signal.{name})\n")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT / "tests"))
    command = [sys.executable, "-m", "pytest", "-p", "conftest", file]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, start_new_session=True
    )
    assert "KeyboardInterrupt" in result.stdout and result.returncode == 2
