"""Real servers for the tests, and the sample loaded against them."""

import importlib.util
import os
import signal
import time

import pymysql
import pytest
import redis
from servers import SIGNALS, Servers
from tools import PROJECT, plain, plain_mysql

servers = Servers()
loaded = []  # the modules that a test has loaded


def pytest_configure(config):
    # Whatever ends pytest, it must still end the servers.
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "error")
    servers.__enter__()
    config.add_cleanup(lambda: servers.__exit__(None, None, None))
    servers.shared_redis, servers.shared_mysql = servers.redis(), servers.mysql()
    # Whatever the environment held before, no test uses another server.
    os.environ.update(servers.environment(servers.shared_redis, servers.shared_mysql))
    os.environ.pop("DB_SSL_CA", None)
    # PyMySQL would load the system's certificates for each connection, which takes 30 ms.
    os.environ["SSL_CERT_FILE"] = os.devnull
    servers.shared_mysql.client(PROJECT / "seed.sql")


def pytest_report_header(config):
    return (
        f"redis-py {redis.__version__}, PyMySQL {pymysql.VERSION_STRING}, "
        f"{servers.shared_redis.version}, {servers.shared_mysql.version}"
    )


def load(**environment):
    """The module, as a new process with this environment would import it."""
    name = f"example{time.perf_counter_ns()}"  # unique, for its log
    spec = importlib.util.spec_from_file_location(name, PROJECT / "example.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, **environment})
        spec.loader.exec_module(module)
    loaded.append(module)
    return module


@pytest.fixture(autouse=True)
def close_connections():
    """After each test. A module is never deleted, because it is told of each fork."""
    yield
    while loaded:
        loaded.pop().idle_connections.clear()


@pytest.fixture(scope="session")
def redis_server():
    return servers.shared_redis


@pytest.fixture(scope="session")
def mysql_server():
    return servers.shared_mysql


@pytest.fixture
def new_servers():
    """Servers for one test alone, which it may kill, stop and fill."""
    with Servers() as own:
        yield own


@pytest.fixture
def example(cache):
    """The sample, with an empty cache."""
    return load()


@pytest.fixture
def cache(redis_server):
    """A client of the same Redis, which is emptied."""
    with plain(redis_server) as client:
        client.flushall()
        yield client


@pytest.fixture
def db(mysql_server):
    """A connection to the same MySQL, which may write. The planets are restored."""
    with plain_mysql(mysql_server) as connection:
        yield connection.cursor()
        seed = (PROJECT / "seed.sql").read_text(encoding="utf-8")
        for statement in ["DROP DATABASE tutorial", *seed.split(";")[:-1]]:
            connection.cursor().execute(statement)
