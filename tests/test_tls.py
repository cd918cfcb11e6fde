"""TLS: who is not who he says he is gets nothing, and nobody on the way can read."""

import time

import pymysql
import pytest
import redis
import trustme
from conftest import PROJECT, load
from servers import Servers, free_port
from tools import Relay, plant, selects, wait_until, warnings

MERCURY = {"id": 1, "name": "Mercury"}
PLANTED = {"id": 1, "name": "Planted"}
CLIENT_HELLO = b"\x16\x03"  # a record of a TLS handshake
SQL = "SELECT id, name FROM planet WHERE id = 1"


class Authority:
    """A certificate authority, all of whose files are in one folder."""

    def __init__(self, folder):
        self.folder = folder
        self.authority = trustme.CA()
        self.file = str(folder / "ca.pem")
        self.authority.cert_pem.write_to_path(self.file)

    def certify(self, name):
        """The names of files with a certificate for this name, and with its key."""
        issued = self.authority.issue_cert(name)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(b"".join(p.bytes() for p in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        return str(certificate), str(key)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """An authority that has certified nobody here."""
    return Authority(tmp_path_factory.mktemp("another"))


# ---------------------------------------------------------------- Redis


def start_redis(own, authority, name):
    certificate, key = authority.certify(name)
    port = free_port()
    tls = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"]
    tls += ["--tls-cert-file", certificate, "--tls-key-file", key]
    return own.redis(*tls, "--tls-ca-cert-file", authority.file, port=port)


@pytest.fixture(scope="module")
def tls_redis(authority):
    with Servers() as own:
        yield start_redis(own, authority, "127.0.0.1")


@pytest.fixture
def tls_cache(tls_redis):
    """A plain client for it, which needs no TLS."""
    file, password = str(tls_redis.socket), tls_redis.password
    with redis.Redis(unix_socket_path=file, password=password) as client:
        client.flushall()
        yield client


def tls_url(server, port, authority, host="127.0.0.1"):
    return f"rediss://:{server.password}@{host}:{port}/0?ssl_ca_certs={authority.file}"


def test_redis_is_used_over_tls(tls_redis, tls_cache, authority, caplog):
    with Relay(tls_redis.port) as relay:
        module = load(REDIS_URL=tls_url(tls_redis, relay.port, authority))
        assert module.planet(1) == MERCURY
        assert module.fetch(SQL) == [MERCURY]
        for key in "planet:1", SQL:
            plant(tls_cache, key)
        assert module.planet(1) == PLANTED
        assert module.fetch(SQL) == [PLANTED]
        assert relay.sent.startswith(CLIENT_HELLO)
        assert_nothing_in(relay.sent, tls_redis.password, "planet", "SELECT")
        assert not warnings(caplog, module)


def assert_nothing_in(sent, *secrets):
    for secret in secrets:
        assert secret.encode() not in sent


def assert_refused(module, cache, relay, server, caplog):
    for _ in range(3):
        assert module.planet(1) == MERCURY
        assert module.fetch(SQL) == [MERCURY]
    assert not cache.keys()
    assert relay.sent.startswith(CLIENT_HELLO)
    assert_nothing_in(relay.sent, server.password, "planet", "SELECT", "AUTH")
    (warning,) = warnings(caplog, module, server.password)
    assert "certificate" in warning


def test_a_redis_that_another_authority_certified_is_refused(
    tls_redis, tls_cache, another, caplog
):
    with Relay(tls_redis.port) as relay:
        module = load(REDIS_URL=tls_url(tls_redis, relay.port, another))
        assert_refused(module, tls_cache, relay, tls_redis, caplog)


def test_a_redis_whose_authority_is_not_known_is_refused(tls_redis, tls_cache, caplog):
    with Relay(tls_redis.port) as relay:
        url = f"rediss://:{tls_redis.password}@127.0.0.1:{relay.port}/0"
        assert_refused(load(REDIS_URL=url), tls_cache, relay, tls_redis, caplog)


def test_a_redis_of_another_name_is_refused(tls_redis, tls_cache, authority, caplog):
    with Relay(tls_redis.port) as relay:
        url = tls_url(tls_redis, relay.port, authority, "localhost")
        assert_refused(load(REDIS_URL=url), tls_cache, relay, tls_redis, caplog)


def test_a_redis_without_tls_is_not_spoken_to_in_clear(
    redis_server, cache, authority, caplog
):
    with Relay(redis_server.port) as relay:
        module = load(REDIS_URL=tls_url(redis_server, relay.port, authority))
        assert module.planet(1) == MERCURY
        assert relay.sent.startswith(CLIENT_HELLO)
        assert_nothing_in(relay.sent, redis_server.password, "planet", "AUTH")
        assert not cache.keys()
        assert len(warnings(caplog, module, redis_server.password)) == 1


def test_a_redis_over_tls_that_hangs_or_restarts_costs_no_more_than_one_without(
    new_servers, authority
):
    server = start_redis(new_servers, authority, "127.0.0.1")
    module = load(REDIS_URL=tls_url(server, server.port, authority))
    module.REDIS_PAUSE = 0.1
    file, password = str(server.socket), server.password
    with redis.Redis(unix_socket_path=file, password=password) as cache:
        for break_it, mend_it in (
            (server.kill, server.start),
            (server.pause, server.resume),
        ):
            module.planet(1)
            break_it()
            start = time.monotonic()
            assert module.planet(1) == MERCURY
            assert time.monotonic() - start < 1
            mend_it()
            cache.flushall()
            wait_until(lambda: module.planet(1) and cache.exists("planet:1"))


# ---------------------------------------------------------------- MySQL


def start_mysql(own, authority, name, *args):
    certificate, key = authority.certify(name)
    files = [f"--ssl-ca={authority.file}", f"--ssl-cert={certificate}"]
    server = own.mysql(*files, f"--ssl-key={key}", *args)
    server.client(PROJECT / "seed.sql")
    return server


@pytest.fixture(scope="module")
def tls_mysql(authority):
    """A MySQL that is certified for this address, and takes nobody without TLS."""
    with Servers() as own:
        yield start_mysql(own, authority, "127.0.0.1", "--require-secure-transport=ON")


def load_for(server, relay, **environment):
    address = {"DB_PORT": str(relay.port), "DB_PASS": server.password}
    return load(**address, **environment)


def cipher(module):
    ((row),) = module.query("SHOW SESSION STATUS LIKE 'Ssl_cipher'")
    return row["Value"]


def assert_encrypted(relay, server):
    """Nothing but the wish for TLS, which has no name in it, was sent in clear."""
    hello = relay.sent.find(CLIENT_HELLO)
    assert hello == 36, "after a packet of 32 bytes and its header"
    secrets = server.password, server.user, "tutorial", "planet", "SELECT", "INSERT"
    assert_nothing_in(relay.sent, *secrets)


def test_mysql_is_used_over_tls_and_verified(tls_mysql, authority, cache):
    with Relay(tls_mysql.port) as relay:
        module = load_for(tls_mysql, relay, DB_SSL_CA=authority.file)
        assert module.planet(1) == MERCURY
        assert module.fetch(SQL) == [MERCURY]
        assert module.save_planet(9, "Pluto") == {"id": 9, "name": "Pluto"}
        assert cipher(module)
        assert_encrypted(relay, tls_mysql)


def test_a_mysql_that_requires_tls_needs_no_setting(tls_mysql, cache):
    with Relay(tls_mysql.port) as relay:
        module = load_for(tls_mysql, relay)
        assert module.planet(1) == MERCURY
        assert cipher(module)
        assert_encrypted(relay, tls_mysql)


def assert_rejected(module, cache):
    for _ in range(2):
        with pytest.raises(pymysql.err.OperationalError):
            module.planet(1)
        with pytest.raises(pymysql.err.OperationalError):
            module.fetch(SQL)
        with pytest.raises(pymysql.err.OperationalError):
            module.save_planet(1, "Stolen")
    assert not cache.exists("planet:1", SQL)


def test_a_mysql_that_another_authority_certified_is_refused(tls_mysql, another, cache):
    with Relay(tls_mysql.port) as relay:
        assert_rejected(load_for(tls_mysql, relay, DB_SSL_CA=another.file), cache)
        assert_encrypted(relay, tls_mysql)


def test_a_mysql_of_another_name_is_refused(tls_mysql, authority, cache):
    with Relay(tls_mysql.port) as relay:
        wrong = {"DB_HOST": "localhost", "DB_SSL_CA": authority.file}
        assert_rejected(load_for(tls_mysql, relay, **wrong), cache)
        assert_encrypted(relay, tls_mysql)


def test_a_mysql_without_tls_is_refused_if_it_should_be_verified(
    mysql_server, authority, cache, db
):
    # Somebody between us and the server could say that it has none, or offer his own.
    before = selects(db)
    with Relay(mysql_server.port) as relay:
        assert_rejected(load_for(mysql_server, relay, DB_SSL_CA=authority.file), cache)
        assert_nothing_in(relay.sent, mysql_server.user, "planet", "SELECT", "INSERT")
    assert selects(db) == before
