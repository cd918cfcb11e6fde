"""What README.md shows is what happens."""

import contextlib
import doctest
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import botocore.session
import jmespath
import pytest
from botocore import xform_name
from botocore.utils import ArgumentGenerator
from botocore.validate import ParamValidator
from conftest import PROJECT
from servers import find

README = (PROJECT / "README.md").read_text(encoding="utf-8")

# (language, text) of each fenced block, in order
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)

# What may differ from what the README shows. Besides, "..." there stands for anything.
VARIES = [
    (r"\d+\.\d\d ms", "0.00 ms"),
    (r"^\(integer\) ([1-9]|10)$", "(integer) 10"),  # the seconds that a key has left
    (r"^tests/local: .*\n", ""),  # what a first run installs
]


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def steady(text):
    for pattern, replacement in VARIES:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


def agree(shown, printed):
    shown, printed = (text and text.rstrip("\n") + "\n" for text in (shown, printed))
    return doctest.OutputChecker().check_output(
        steady(shown), steady(printed), doctest.ELLIPSIS
    )


# ---- Python sessions


@pytest.fixture
def ageing(cache, monkeypatch):
    """time.sleep takes no time, but Redis has got that much older afterwards."""

    def sleep(seconds):
        for key in cache.scan_iter():
            cache.pexpire(key, cache.pttl(key) - 1000 * seconds)

    monkeypatch.setattr("time.sleep", sleep)


def sessions():
    """The Python sessions: a console block between two means that Python was left."""
    for text in re.split(r"^```console$", README, flags=re.MULTILINE):
        found = re.findall(r"^```pycon\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        yield "\n".join(found)


def test_python_sessions_print_what_they_show(db, cache, ageing, monkeypatch, capsys):
    monkeypatch.syspath_prepend(PROJECT)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for session in sessions():
        monkeypatch.delitem(sys.modules, "example", raising=False)
        test = doctest.DocTestParser().get_doctest(session, {}, "README.md", None, 0)
        runner.run(test)
    assert runner.tries > 20
    assert not runner.failures, capsys.readouterr().out


# ---- commands and what they print

# Not run, because it is this suite: only the form of what it prints is compared.
SUITE = "tests/local pytest"


def commands():
    """[command, what is shown below it] for all console blocks."""
    for text in blocks("console"):
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            yield part.split("\n", 1)


@pytest.fixture
def terminal(db, cache, tmp_path):
    """Types commands into the shell that `tests/local bash` opens. Returns what appears
    below each of them."""
    (tmp_path / "redis-cli").symlink_to(find("redis-cli", "valkey-cli"))
    path = [Path(sys.executable).parent, tmp_path, os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(map(str, path))}
    end = "\x1e"  # of what one command prints

    def run(*commands):
        script = "".join(f"{command}\nprintf '{end}'\n" for command in commands)
        printed = subprocess.run(
            ["bash", "-c", script],
            cwd=PROJECT,
            # redis-cli then writes as it does for a person at a terminal.
            env={**environment, "FAKETTY": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        ).stdout
        return printed.decode().split(end)[:-1]

    yield run
    cache.config_set("maxmemory-policy", "noeviction")


def test_commands_print_what_they_show(terminal):
    run = [(command, shown) for command, shown in commands() if command != SUITE]
    assert len(run) > 10
    printed = terminal(*[command for command, _ in run])
    for (command, shown), text in zip(run, printed):
        assert agree(shown, text), f"{command}\nprints\n{text}"
    assert len(printed) == len(run)


def test_the_suite_prints_its_header_and_its_last_line_as_shown(request):
    config = request.config
    headers = config.hook.pytest_report_header(config=config, start_path=PROJECT)
    (header,) = (line for line in headers if str(line).startswith("redis-py"))
    shown = dict(commands())[SUITE]
    numbers = re.compile(r"(Redis|Valkey|MariaDB|MySQL)? ?[\d.]+")
    assert numbers.sub("N", header) in numbers.sub("N", shown)
    assert shown.endswith("\n===== ... passed in ... =====\n")


@contextlib.contextmanager
def closed_port():
    """A port that answers nothing at all, as behind a security group."""
    # The kernel ignores those who knock once the queue of those who wait is full.
    with socket.socket() as door, contextlib.ExitStack() as queue:
        door.bind(("127.0.0.1", 0))
        door.listen(0)
        for _ in range(4):
            guest = queue.enter_context(socket.socket())
            guest.setblocking(False)
            guest.connect_ex(door.getsockname())
        yield door.getsockname()[1]


def test_closed_ports_are_reported_as_shown(terminal):
    with closed_port() as port:
        url = f"REDIS_URL=redis://127.0.0.1:{port}"
        (printed,) = terminal(f"{url} DB_PORT={port} python example.py")
    (shown,) = blocks("text")
    assert re.sub(r"'database-1\S*'", "'127.0.0.1'", shown) == steady(printed)


# ---- quotations, links, form


def test_quoted_code_stands_word_for_word_in_the_program():
    program = (PROJECT / "example.py").read_text(encoding="utf-8")
    assert len(blocks("python")) > 3
    for text in blocks("python"):
        place = 0
        # A line of three dots leaves something out, though nothing in between functions.
        for part in re.split(r"^ *\.\.\.$", text.strip("\n"), flags=re.MULTILINE):
            found = program.find(part, place)
            assert found >= 0, part
            assert program[place:found].count("\n\n\n") == 0 or not place, part
            place = found + len(part)


def test_local_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)", PROSE, re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
    links = re.findall(r"\]\((?!https://)([^)]*)\)", PROSE)
    assert len(links) > 5
    for link in links:
        path, _, anchor = link.partition("#")
        assert (PROJECT / path).exists(), link
        assert not anchor or anchor in anchors, link


def test_every_sentence_has_a_line_of_its_own():
    for line in PROSE.splitlines():
        if not line.startswith(("|", "- ")):
            assert not re.search(r"[a-z)`*][.!?] [A-Z*`]", line), line
    assert "![" not in README


# The table of failures: how a line begins, and the name of a test that keeps it.
KEPT_BY = {
    "Redis is down": "a_redis_that_refuses_costs_next_to_nothing",
    "Redis hangs": "ten_seconds_of_calls_lose_less_than_one",
    "Redis is killed": "a_redis_killed_and_restarted_between_calls",
    "Redis is full": "a_full_redis_still_serves_hits",
    "Redis becomes": "after_a_failover_the_new_primary_is_used",
    "the certificate of Redis": r"\w*(_tls_|_ca_|certificate)",
    "a key holds": "what_another_program_wrote_is_a_miss_and_is_replaced",
    "many miss": "a_crowd_at_a_cold_query_is_one_select",
    "who asks": "when_the_process_that_asks_is_killed_another_takes_over",
    "MySQL drops": "a_connection_that_was_killed_is_replaced_unnoticed",
    "MySQL is down": "while_mysql_is_down_hits_are_served",
    "a query takes": "a_query_that_takes_too_long_is_cut_off",
    "the certificate of MySQL": r"\w*(_tls_|_ca_|certificate)",
    "MySQL refuses": "a_save_that_mysql_refuses_changes_nothing",
    "Redis is out of reach": "a_save_reaches_mysql_when_redis_is_away",
}


def test_each_line_of_the_table_of_failures_is_kept_by_a_test():
    _, table = README.split("| what fails |")
    lines = re.findall(r"^\| (\w.*)", table.split("\n\n")[0], re.MULTILINE)
    tests = "".join(
        path.read_text() for path in Path(__file__).parent.glob("test_*.py")
    )
    for line, (start, name) in zip(lines, KEPT_BY.items()):
        assert line.startswith(start)
        assert re.search(f"^def test_{name}", tests, re.MULTILINE), line
    assert len(lines) == len(KEPT_BY)


# ---- AWS

# Pasted into bash, the blocks run as they would, but for these.
STAND_INS = r"""
set -u
aws() {
    printf '%s\0' "$@" end-of-command >>"$LOG"
    case "$*" in
        *SecretString*) echo '{"username": "admin", "password": "it'"'"'s $1"}' ;;
        *AvailabilityZone*) printf '%s\t%s\n' zone-a net-1 zone-a net-2 zone-b net-3 ;;
        *'query '*'.['*','*) echo "first-of-$2 second-of-$2" ;;
        *--query*) echo "answer-to-$2" ;;
    esac
}
"""

# These the command makes itself from what AWS calls otherwise.
MADE_BY_CLI = {"authorize-security-group-ingress": {"protocol", "port", "source-group"}}


def steps():
    """The blocks with aws commands: those of steps 1 and 2, of step 4, and of step 5."""
    for part in re.split(r"^## Step [45].*", README, flags=re.MULTILINE):
        texts = re.findall(r"^```sh\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
        yield "".join(text for text in texts if re.search(r"\baws ", text))


@pytest.fixture(scope="module")
def pasted(tmp_path_factory):
    """The arguments of each aws command, and what the blocks print."""
    log = tmp_path_factory.mktemp("aws") / "log"
    printed = ""
    for step in steps():  # each in a new window
        bash = subprocess.run(
            ["bash", "-c", STAND_INS + step],
            env={"PATH": os.environ["PATH"], "LOG": str(log)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert bash.stderr == ""
        printed += bash.stdout
    called = log.read_text().split("end-of-command\0")[:-1]
    return [text.split("\0")[:-1] for text in called], printed


@pytest.fixture(scope="module")
def service():
    session = botocore.session.get_session()
    names = session.get_available_services()

    def load(name):
        assert name in names, f"no such service: {name}"
        return session.get_service_model(name), session

    return load


def shorthand(text):
    """The value of `A=1,B={C=2}`, as the aws command reads it."""
    if text.startswith("{"):
        text = text[1:-1]
    parts = re.findall(r"(\w+)=(\{[^}]*\}|[^,]*)", text)
    assert ",".join(f"{key}={value}" for key, value in parts) == text
    return {k: shorthand(v) if v.startswith("{") else v for k, v in parts}


def typed(value, shape):
    """A value from the command line as what the service's model wants."""
    if shape.type_name == "list":
        values = value if isinstance(value, list) else [value]
        return [typed(each, shape.member) for each in values]
    if isinstance(value, list):
        assert len(value) == 1, f"one value expected: {value}"
        (value,) = value
    if shape.type_name == "structure":
        fields = shorthand(value) if isinstance(value, str) else value
        unknown = fields.keys() - shape.members.keys()
        assert not unknown, f"{shape.name} has no {unknown}"
        return {name: typed(fields[name], shape.members[name]) for name in fields}
    if shape.type_name in ("integer", "long"):
        return int(value)
    allowed = getattr(shape, "enum", None) or [value]
    assert value in allowed, f"{value} is not one of {allowed}"
    return value


def check(arguments, load):
    """Raise if the aws command would refuse these arguments."""
    assert "" not in arguments, "a variable is empty"
    service, operation, *rest = arguments
    model, session = load(service)
    if operation == "wait":
        waiters = session.get_waiter_model(service)
        names = {xform_name(name, "-"): name for name in waiters.waiter_names}
        operation = waiters.get_waiter(names[rest.pop(0)]).operation
        operation = xform_name(operation, "-")
    names = {xform_name(name, "-"): name for name in model.operation_names}
    api = model.operation_model(names[operation])
    members = {xform_name(n, "-"): (n, s) for n, s in api.input_shape.members.items()}

    given, values = {}, None
    for word in rest:
        if word.startswith("--"):
            values = given.setdefault(word[2:], [])
        else:
            values.append(word)

    query = given.pop("query", None)
    if query:
        answer = ArgumentGenerator(use_member_names=True)
        sample = answer.generate_skeleton(api.output_shape)
        assert jmespath.search(*query, sample), f"never an answer: {query}"
        assert given.pop("output") == ["text"]
    for name in MADE_BY_CLI.get(operation, ()):
        assert len(given.pop(name)) == 1
    parameters = {}
    for name, words in given.items():
        switched_off = name.startswith("no-") and name not in members
        member, shape = members[name[3:] if switched_off else name]
        if shape.type_name == "boolean":
            assert not words, f"--{name} takes no value"
            parameters[member] = not switched_off
        else:
            assert words and not switched_off, f"--{name} takes a value"
            parameters[member] = typed(words, shape)
    report = ParamValidator().validate(parameters, api.input_shape)
    assert not report.has_errors(), report.generate_report()


def test_every_aws_command_exists_with_its_options(pasted, service):
    called, _ = pasted
    written = {tuple(m) for s in steps() for m in re.findall(r"\baws (\S+) (\S+)", s)}
    assert written == {tuple(arguments[:2]) for arguments in called}
    for arguments in called:
        try:
            check(arguments, service)
        except (AssertionError, KeyError, ValueError) as error:
            pytest.fail(f"aws {shlex.join(arguments)}\n{error!r}")


def test_a_command_that_aws_would_refuse_is_noticed(service):
    good = "rds delete-db-instance --db-instance-identifier a --skip-final-snapshot"
    check(good.split(), service)
    for bad in (
        good.replace("rds", "rsd"),
        good.replace("delete", "remove"),
        good.replace("skip", "skim"),
        good + " please",
        "rds delete-db-instance --skip-final-snapshot",
        "rds wait db-instance-gone --db-instance-identifier a",
        "ec2 create-volume --availability-zone a --volume-type fast",
        "rds create-db-instance --db-instance-identifier a --allocated-storage large",
    ):
        with pytest.raises((AssertionError, KeyError, ValueError)):
            check(bad.split(), service)


def test_step_5_deletes_all_that_was_created(pasted):
    called, _ = pasted

    def things(verb):
        pattern = re.compile(f"{verb}-(?!security-group)")
        return {(a[0], a[1][7:], a[3]) for a in called if pattern.match(a[1])}

    assert len(things("create")) > 4
    assert things("create") == things("delete")
    # Groups have a name when they are made and are looked up by it to be deleted.
    groups = {a[3] for a in called if a[1] == "create-security-group"}
    found = {f"Name=group-name,Values={name}" for name in groups}
    assert found == {a[3] for a in called if a[1] == "describe-security-groups"}
    assert sum(a[1] == "delete-security-group" for a in called) == len(groups)


def test_the_lines_to_write_down_can_be_pasted(pasted):
    lines = [line for line in pasted[1].splitlines() if line.startswith("export")]
    show = f'{shlex.quote(sys.executable)} -c "import json, os; print(json.dumps(dict(os.environ)))"'
    bash = ["bash", "-c", "\n".join([*lines, show])]
    there = json.loads(subprocess.check_output(bash, text=True, env={}))
    assert there["REDIS_URL"] == "rediss://answer-to-describe-replication-groups:6379/0"
    assert there["DB_HOST"] == "first-of-describe-db-instances"
    assert there["DB_PASS"] == "it's $1"
