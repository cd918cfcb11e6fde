"""Real servers for the tests, and the sample loaded against them."""

import importlib.util
import itertools
import os
import signal
import sys

import pymysql
import pytest
import redis
from servers import Servers
from tools import PROJECT, plain, plain_mysql

NUMBER = itertools.count()

servers = Servers()


def pytest_configure(config):
    # Terminated, pytest must still end what the tests have started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "error")
    servers.__enter__()
    try:
        servers.shared_redis, servers.shared_mysql = servers.redis(), servers.mysql()
    except BaseException:
        servers.__exit__(*sys.exc_info())
        raise
    # Whatever the environment held before, nobody here reaches a server of its own.
    os.environ.update(servers.environment(servers.shared_redis, servers.shared_mysql))
    os.environ.pop("DB_SSL_CA", None)
    # PyMySQL loads all certificates of the system for each connection: 30 ms, and no
    # test needs them.
    os.environ["SSL_CERT_FILE"] = os.devnull
    servers.shared_mysql.client(PROJECT / "seed.sql")


def pytest_unconfigure(config):
    servers.__exit__(None, None, None)


def pytest_report_header(config):
    return (
        f"redis-py {redis.__version__}, PyMySQL {pymysql.VERSION_STRING}, "
        f"{servers.shared_redis.version}, {servers.shared_mysql.version}"
    )


def load(**environment):
    """The module, as a new process with this environment would import it."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        path = PROJECT / "example.py"
        spec = importlib.util.spec_from_file_location(f"example{next(NUMBER)}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        os.environ.clear()
        os.environ.update(before)


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
    """The sample, fresh, with an empty cache."""
    return load()


@pytest.fixture
def cache(redis_server):
    """A plain client for the same Redis, emptied."""
    with plain(redis_server) as client:
        client.flushall()
        yield client


@pytest.fixture
def db(mysql_server):
    """A plain connection to the same MySQL, which may write. The planets are restored."""
    with plain_mysql(mysql_server) as connection:
        yield connection.cursor()
        seed = (PROJECT / "seed.sql").read_text(encoding="utf-8")
        for statement in ["DROP DATABASE tutorial", *seed.split(";")[:-1]]:
            connection.cursor().execute(statement)
