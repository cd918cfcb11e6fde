"""The benchmark measures all parts, and leaves nothing behind."""

import re
import signal
import subprocess
import sys
import time

import benchmark
import pytest
from tools import wait_until

COMMAND = [sys.executable, "-W", "error", benchmark.__file__]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def own_databases(db):
    return db.execute("SHOW DATABASES LIKE 'cache_aside_benchmark%'")


def test_all_parts_run_and_only_the_keys_of_others_are_left(cache, db):
    cache.hset("planet:1", "name", "not the benchmark's")
    result = subprocess.run([*COMMAND, "--quick"], **PIPES, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert (cache.keys(), own_databases(db)) == ([b"planet:1"], 0)
    printed = re.sub("[ |]+", " ", result.stdout)
    for row in (
        r"costly query( [\d.]+){4} [\d.]+%",
        r"200 rows pickle( [\d.]+){4}",
        r"1 row by its key HGETALL HGETALL SET ",
        r"20 fetch, 200 ms 1 0 ",
        r"300( [\d.]+){3}",
        r"noeviction( [\d.]+%){2}",
    ):
        assert re.search(f"\n {row}", printed), row
    assert result.stdout.count("%%\nxychart-beta\n") == 2


@pytest.mark.parametrize("keys", [0, 3], ids=["while it fills tables", "later"])
def test_interrupted_it_removes_what_is_its_own(keys, cache, db):
    with subprocess.Popen([*COMMAND, "--only", "limit"], **PIPES) as process:
        wait_until(lambda: own_databases(db) and cache.dbsize() >= keys)
        while process.poll() is None:  # press Ctrl-C again while it cleans up
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
    assert (process.returncode, own_databases(db), cache.keys()) == (130, 0, [])
