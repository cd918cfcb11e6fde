"""tests/local runs the command, tells the truth about it, and leaves nothing behind."""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from servers import ServerError, Servers

TESTS = Path(__file__).resolve().parent
PROJECT = TESTS.parent
LOCAL = [sys.executable, str(TESTS / "local")]
VENV = TESTS / ".venv" / "{}.{}".format(*sys.version_info)

REPORT = """
import json, os, sys, example, pymysql, redis
database = pymysql.connect(
    host=os.environ["DB_HOST"], port=int(os.environ["DB_PORT"]),
    user=os.environ["DB_USER"], password=os.environ["DB_PASS"],
    database=os.environ["DB_NAME"],
)
cursor = database.cursor()
cursor.execute("SELECT name FROM planet WHERE id = 3")
print(json.dumps({
    "ping": redis.Redis.from_url(os.environ["REDIS_URL"]).ping(),
    "name": cursor.fetchone()[0],
    "example": example.__file__,
    "python": sys.prefix,
    "folder": os.getcwd(),
    "ca": os.environ.get("DB_SSL_CA"),
}))
"""


def run(*command, local=LOCAL, **options):
    """Run tests/local to its end."""
    return subprocess.run(
        [*local, *command], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture
def copy(tmp_path):
    """A copy of the project, without its environment, in a folder with a space."""
    copy = tmp_path / "my projects" / "cache"
    (copy / "tests").mkdir(parents=True)
    for name in (
        "example.py",
        "seed.sql",
        "requirements.txt",
        "tests/local",
        "tests/servers.py",
        "tests/requirements.txt",
    ):
        shutil.copy(PROJECT / name, copy / name)
    return copy


# ---------------------------------------------------------------- the command


def test_input_output_and_exit_status_are_the_commands():
    result = run("sh", "-c", "cat; exit 7", input="from here\n")
    assert (result.stdout, result.stderr) == ("from here\n", "")
    assert result.returncode == 7


def test_death_by_a_signal_is_passed_on_as_a_shell_does():
    assert run("sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_a_command_that_does_not_exist_is_named_and_is_127():
    result = run("no such command")
    assert result.returncode == 127
    assert result.stderr == ("tests/local: command not found: no such command\n")


def test_no_command_shows_the_usage_and_is_2():
    result = run()
    assert result.returncode == 2
    assert result.stderr.startswith("tests/local: usage: ")


def test_the_command_finds_both_servers_the_seed_the_venv_and_the_project(tmp_path):
    env = {**os.environ, "DB_SSL_CA": "/of/another/database", "DB_HOST": "elsewhere"}
    result = run("python", "-c", REPORT, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "ping": True,
        "name": "Earth",
        "example": str(PROJECT / "example.py"),
        "python": str(VENV),
        "folder": str(tmp_path),
        "ca": None,
    }


def test_the_projects_path_may_have_a_space(copy):
    (copy / "tests" / ".venv").symlink_to(TESTS / ".venv")
    local = [sys.executable, str(copy / "tests" / "local")]
    result = run("python", "-c", REPORT, local=local, cwd=copy.parent)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["example"] == str(copy / "example.py")


# ---------------------------------------------------------------- preparation


def test_a_second_run_installs_nothing():
    run("true")
    before = (VENV / "stamp").stat().st_mtime_ns
    assert run("true").stderr == ""
    assert (VENV / "stamp").stat().st_mtime_ns == before


def test_a_failed_pip_install_is_shown_and_tried_again(copy):
    (copy / "requirements.txt").write_text("no-such-package-anywhere\n")
    local = [sys.executable, str(copy / "tests" / "local")]
    result = run("true", local=local, env={**os.environ, "PIP_NO_INDEX": "1"})
    assert result.returncode == 1
    assert "installing the Python packages failed; its output ends:" in result.stderr
    assert "No matching distribution found for no-such-package" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(copy.glob("tests/.venv/*/stamp"))


def test_a_failed_installation_of_servers_is_shown(tmp_path, monkeypatch, capfd):
    for name, script in {
        "apt-get": 'echo "E: cannot $1 here" >&2; exit 100',
        "sudo": 'exec "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    install = runpy.run_path(str(TESTS / "local"))["install"]
    with pytest.raises(SystemExit) as stopped:
        install(["redis"])
    assert stopped.value.code == (
        "tests/local: installing redis-tools failed; its output ends:\n"
        "E: cannot update here\nE: cannot install here"
    )
    assert capfd.readouterr().err == "tests/local: installing redis-tools\n"


def test_without_a_package_manager_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    install = runpy.run_path(str(TESTS / "local"))["install"]
    with pytest.raises(SystemExit, match="please install redis, mysqld: no apt-get"):
        install(["redis", "mysqld"])


# ---------------------------------------------------------------- the servers


def test_a_server_that_cannot_start_is_named_and_its_log_shown():
    with Servers() as servers, pytest.raises(ServerError) as error:
        servers.redis("--no-such-option", "1")
    first, *log = str(error.value).splitlines()
    assert "did not start; its log ends:" in first
    assert "no-such-option" in "\n".join(log)


def test_a_program_that_is_no_server_is_named():
    result = run("true", env={**os.environ, "LOCAL_REDIS": "/no/such/redis"})
    assert result.returncode == 1
    assert result.stderr.startswith("tests/local: ")
    assert "/no/such/redis" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_killed_server_starts_again_with_the_same_port_password_and_data():
    with Servers() as servers:
        redis, mysql = servers.redis(), servers.mysql()
        mysql.client("CREATE DATABASE kept")
        before = redis.url, mysql.port, mysql.password
        for server in redis, mysql:
            server.kill()
            assert not server.answers()
            server.start()
        assert (redis.url, mysql.port, mysql.password) == before
        assert "kept" in mysql.client("SHOW DATABASES")


def test_a_paused_server_hangs_until_it_is_resumed():
    with Servers() as servers:
        redis = servers.redis()
        redis.pause()
        assert not redis.answers()
        redis.resume()
        assert redis.answers()


# ---------------------------------------------------------------- nothing stays

RUN_IN_A_TERMINAL = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""
SURVIVE_A_CTRL_C = """
import sys, time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # long enough for tests/local to end this, if it were to
    print("still here")
    sys.exit(5)
"""
LEAVE_BY_A_FORK = """
import os, sys
from servers import Servers
with Servers() as servers:
    redis = servers.redis()
    child = os.fork()
    if not child:
        sys.exit()
    os.waitpid(child, 0)
    print(redis.answers())
"""


def command_lines():
    """Of all processes. A small machine has no ps, and a Mac has no /proc."""
    if not Path("/proc/self/cmdline").exists():
        return run("-A", "-ww", "-o", "args", local=["ps"]).stdout.splitlines()
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            lines.append(path.read_text(errors="replace").replace("\0", " ").strip())
    return lines


class Running:
    """A tests/local whose command has a child and does not end by itself."""

    def __init__(self, folder):
        self.folder = folder
        script = """
            echo "$REDIS_URL" "$DB_PASS"
            python -c "import time; time.sleep(60)" "$0"
            true
        """
        self.process = subprocess.Popen(
            [*LOCAL, "sh", "-c", script, folder],
            env={**os.environ, "TMPDIR": folder},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # no terminal, wherever the tests run
        )
        url, self.db_pass = self.process.stdout.readline().split()
        self.redis_pass, self.redis_port = re.findall(r":([^:@]+)@.*:(\d+)", url)[0]

    def traces(self):
        """Its processes, its command's and its servers', and its files."""
        marks = self.folder, f"127.0.0.1:{self.redis_port}"
        lines = [
            line for line in command_lines() if any(mark in line for mark in marks)
        ]
        return lines + os.listdir(self.folder)


@pytest.fixture
def running():
    # Not tmp_path: its name is too long for the socket files of servers.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        running = Running(folder)
        yield running
        running.process.kill()
        running.process.communicate()


def test_passwords_are_on_no_command_line(running):
    lines = command_lines()
    assert any(f"--datadir={running.folder}" in line for line in lines)
    for password in running.redis_pass, running.db_pass:
        assert len(password) == 32
        assert not [line for line in lines if password in line]


def test_no_server_is_given_its_password_on_a_command_line():
    # Redis soon hides its command line; this is what it showed until then.
    with Servers() as servers:
        for server in servers.redis(), servers.mysql():
            assert server.password not in " ".join(map(str, server.command()))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_command_and_servers(running, name):
    assert len(running.traces()) >= 6  # three of tests/local, two servers, one folder
    running.process.send_signal(signal.Signals[name])
    assert running.process.wait(20) == 128 + signal.Signals[name]
    assert running.traces() == []


def test_even_sigkill_ends_command_and_servers(running):
    running.process.kill()
    deadline = time.monotonic() + 20
    while running.traces() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running.traces() == []


def test_a_command_that_ignores_sigterm_is_killed():
    command = "trap '' TERM; echo ready; while :; do sleep 1; done"
    with subprocess.Popen(
        [*LOCAL, "sh", "-c", command], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        process.stdout.readline()
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM


def test_in_a_terminal_a_ctrl_c_is_the_commands_business():
    try:
        for end in os.openpty():
            os.close(end)
    except OSError:
        pytest.skip("this machine has no terminals")
    command = [*LOCAL, "python", "-c", SURVIVE_A_CTRL_C]
    with subprocess.Popen(
        [sys.executable, "-c", RUN_IN_A_TERMINAL, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        while b"ready" not in process.stdout.readline():
            assert process.poll() is None
        process.stdin.write(b"\x03")
        process.stdin.flush()
        assert b"still here" in process.stdout.read()
        assert process.wait(20) == 5


def test_a_fork_of_the_owner_leaves_the_servers_alone():
    result = run("-c", LEAVE_BY_A_FORK, local=[sys.executable], cwd=TESTS)
    assert result.stdout == "True\n", result.stderr
