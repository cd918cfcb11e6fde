"""What README.md shows is what happens."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pymysql
import pytest
from conftest import PROJECT, load
from servers import find

README = (PROJECT / "README.md").read_text(encoding="utf-8")
PROGRAM = (PROJECT / "example.py").read_text(encoding="utf-8")

# (language, text) of each fenced block, in order
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# What may differ from what the page shows. "..." on the page stands for anything.
VARIES = [
    (r"\d+\.\d\d ms", "0.00 ms"),
    (r"^tests/local: .*\n", ""),  # what a first run installs
]


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def prose(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def agree(shown, printed):
    for pattern, replacement in VARIES:
        shown = re.sub(pattern, replacement, shown, flags=re.MULTILINE)
        printed = re.sub(pattern, replacement, printed, flags=re.MULTILINE)
    compare = doctest.OutputChecker().check_output
    return compare(shown.strip() + "\n", printed.strip() + "\n", doctest.ELLIPSIS)


# ---- Python sessions


def sessions():
    """The Python sessions. A block whose first line imports example begins a new one."""
    found = []
    for text in blocks("pycon"):
        first = text.splitlines()[0]
        if not found or re.match(r">>> import .*\bexample", first):
            found.append(text)
        else:
            found[-1] += text
    return found


@pytest.mark.parametrize("session", sessions(), ids=["plain", "real"])
def test_a_python_session_prints_what_it_shows(session, db, cache, tmp_path):
    file = tmp_path / "session.txt"
    file.write_text(re.sub(r"\d+\.\d\d ms", "... ms", session))
    (tmp_path / "customers.py").write_text(blocks("py")[1])
    result = subprocess.run(
        [sys.executable, "-m", "doctest", "-v", "-o", "ELLIPSIS", file],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert f"{session.count('>>> ')} passed" in result.stdout


def test_the_example_for_a_program_runs(example, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "example", example)
    variables = {}
    exec(blocks("py")[0], variables)  # noqa: S102
    assert variables["customers"] == []
    assert not cache.keys()  # it has invalidated what it has fetched


def test_the_user_for_a_program_has_the_rights_that_it_needs(db, cache):
    for statement in blocks("sql")[0].split(";")[:-1]:
        db.execute(statement.replace("shop", "tutorial"))
    module = load(DB_USER="app", DB_PASS="secret")
    assert module.fetch("SELECT name FROM planet WHERE id = 1") == [{"name": "Mercury"}]
    assert module.save_planet(1, "New") == module.planet(1) == {"id": 1, "name": "New"}
    module.write("DELETE FROM planet WHERE id = 1")
    with pytest.raises(pymysql.Error, match="denied"):
        module.fetch("SELECT * FROM mysql.user")


def test_the_functions_for_customers_use_one_id_for_the_key_and_the_row(
    example, db, cache, monkeypatch
):
    monkeypatch.setitem(sys.modules, "example", example)
    db.execute("INSERT INTO customer (id, name) VALUES (1, 'Ada'), (10, 'Bob')")
    customers = {}
    exec(blocks("py")[1], customers)  # noqa: S102
    assert customers["customer"]("1_0")["id"] == 10  # MySQL would take the text for 1
    customers["change_email"]("1_0", "bob@example.com")
    assert customers["customer"](10)["email"] == "bob@example.com"
    customers["delete_customer"]("1_0")
    assert customers["customer"](10) is None
    assert customers["customer"](1)["name"] == "Ada"


# ---- commands and what they print


@pytest.fixture
def terminal(db, cache, tmp_path):
    """Run commands in a shell as `tests/local bash` opens it; what each prints."""
    (tmp_path / "redis-cli").symlink_to(find("redis-cli", "valkey-cli"))
    path = [Path(sys.executable).parent, tmp_path, os.environ["PATH"]]
    end = "\x1e"  # of what one command prints

    def run(*commands):
        script = "".join(f"{command}\nprintf '{end}'\n" for command in commands)
        printed = subprocess.run(
            ["bash", "-c", script],
            cwd=PROJECT,
            # redis-cli then writes as it does for a person at a terminal.
            env={**os.environ, "PATH": os.pathsep.join(map(str, path)), "FAKETTY": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        ).stdout
        return printed.decode().split(end)[:-1]

    yield run
    cache.config_set("maxmemory", "0")
    cache.config_set("maxmemory-policy", "noeviction")


def commands():
    """[command, what is shown below it] for all console blocks."""
    for text in blocks("console"):
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            yield part.split("\n", 1)


def test_commands_print_what_they_show(terminal):
    # Without pytest, which is this suite.
    run, shown = zip(*[pair for pair in commands() if "pytest" not in pair[0]])
    assert len(run) == 4
    for command, expected, printed in zip(run, shown, terminal(*run)):
        assert agree(expected, printed), f"{command}\nprints\n{printed}"


# ---- quoted code, links, form


def test_quoted_code_stands_word_for_word_in_the_program():
    quoted = blocks("python")
    assert len(quoted) >= 6
    for text in quoted:
        assert f"\n\n{text}\n\n" in PROGRAM, text  # from the first line to the last


@pytest.mark.parametrize("page", ["README.md", "tests/README.md"])
def test_local_links_lead_somewhere(page):
    file = PROJECT / page
    links = re.findall(r"\]\((?!https://)([^)]*)\)", prose(file.read_text()))
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", prose(target.read_text()), re.MULTILINE)
            names = [
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings
            ]
            assert anchor in names, link


# The tables of failures: how a line begins, and the test that keeps it.
KEPT_BY = {
    "Redis is down": "a_redis_that_is_down_costs_almost_nothing_and_is_reported_once",
    "Redis hangs": "ten_seconds_of_calls_lose_less_than_one_to_a_redis_that_hangs",
    "Redis is full": "a_full_redis_costs_no_result_and_serves_hits",
    "many callers": "a_crowd_at_a_cold_query_is_one_select",
    "a row is saved": "a_reader_who_stores_late_does_not_undo_a_save",
    "MySQL closes": "a_connection_that_mysql_has_closed_is_replaced_unnoticed",
    "MySQL is down": "while_mysql_is_down_hits_are_served_and_misses_fail_at_once",
    "MySQL hangs": "callers_that_miss_while_mysql_hangs_get_its_error_within_seconds",
    "Redis is killed": "a_redis_killed_and_restarted_between_calls_is_hardly_noticed",
    "Redis is read-only": "a_read_only_redis_costs_no_result_and_serves_hits",
    "a key holds": "a_value_that_cannot_be_read_is_a_miss_is_replaced_and_is_reported",
    "the process that loads": "if_the_process_that_loads_is_killed_another_one_loads",
    "a query takes": "a_query_that_takes_too_long_is_cut_off_and_not_repeated",
    "more than `MAX_CONNECTIONS`": "a_call_for_which_no_connection_becomes_free_raises_an_error",
    "MySQL refuses": "a_save_that_mysql_refuses_changes_nothing",
    "Redis cannot be reached": "a_record_that_a_save_could_not_remove_is_removed_later",
    "a certificate": "a_redis_that_is_not_verified_gets_nothing",
}


def test_each_line_of_the_tables_of_failures_is_kept_by_a_test():
    tables = re.findall(r"\| what fails .*\n((?:\|.*\n)+)", README)
    lines = re.findall(r"^\| (\w.*)", "".join(tables), re.MULTILINE)
    files = Path(__file__).parent.glob("test_*.py")
    tests = "".join(path.read_text() for path in files)
    assert len(lines) == len(KEPT_BY)
    for line, (start, name) in zip(lines, KEPT_BY.items()):
        assert line.startswith(start)
        assert f"\ndef test_{name}(" in tests, line
