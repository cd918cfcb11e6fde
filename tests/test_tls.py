"""TLS: nobody on the way can read, and a server that cannot prove its name gets nothing."""

import contextlib
import re

import pymysql
import pytest
import trustme
from conftest import PROJECT, load, servers
from servers import Redis, Servers, free_port
from tools import MERCURY, Relay, plain, plant, warnings

SQL = "SELECT id, name FROM planet WHERE id = 1"
CLIENT_HELLO = b"\x16\x03"  # a record of a TLS handshake

# Files of two authorities, and of what the first has issued for 127.0.0.1.
CA, ANOTHER_CA, PEM = [str(servers.folder / name) for name in ("ca", "another", "pem")]
authority = trustme.CA()
authority.cert_pem.write_to_path(CA)
trustme.CA().cert_pem.write_to_path(ANOTHER_CA)
authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(PEM)


@pytest.fixture
def tls_redis(new_servers):
    """A Redis that has a second port, for TLS."""
    args = f"--tls-cert-file {PEM} --tls-key-file {PEM} --tls-ca-cert-file {CA}".split()
    args += ["--tls-auth-clients", "no", "--tls-port", free_port()]
    server = new_servers.redis(*args)
    server.tls_port = args[-1]
    return server


@pytest.fixture(scope="module")
def tls_mysql():
    """A MySQL that refuses clients without TLS."""
    args = [f"--ssl-ca={CA}", f"--ssl-cert={PEM}", f"--ssl-key={PEM}"]
    with Servers() as own:
        server = own.mysql(*args, "--require-secure-transport=ON")
        server.client(PROJECT / "seed.sql")
        yield server


@contextlib.contextmanager
def relayed(server, ca=CA, host="127.0.0.1"):
    """The sample, which reaches a server through a relay that can read nothing."""
    with Relay(getattr(server, "tls_port", server.port)) as relay:
        password, port = server.password, str(relay.port)
        if isinstance(server, Redis):
            url = f"rediss://:{password}@{host}:{port}/0?ssl_ca_certs={ca}"
            yield load(REDIS_URL=url)
        else:
            yield load(DB_HOST=host, DB_PORT=port, DB_PASS=password, DB_SSL_CA=ca)
        # A client of MySQL first sends a packet of 36 bytes, which asks for TLS.
        assert not relay.sent or CLIENT_HELLO in relay.sent[:38]
        secrets = f"{password}|AUTH|root|tutorial|planet|SELECT|INSERT"
        assert not re.search(secrets.encode(), relay.sent)


def test_redis_is_used_over_tls(tls_redis, caplog):
    with relayed(tls_redis) as module, plain(tls_redis) as cache:
        assert [module.planet(1)] == module.fetch(SQL) == [MERCURY]
        plant(cache, "planet:1")
        plant(cache, SQL)
        assert module.planet(1) == module.fetch(SQL)[0] == {"id": 1, "name": "Planted"}
        assert not warnings(caplog, module)


@pytest.mark.parametrize("wrong", ["authority", "unknown authority", "name", "no TLS"])
def test_a_redis_that_is_not_verified_gets_nothing(wrong, tls_redis, caplog):
    if wrong == "no TLS":
        tls_redis.tls_port = tls_redis.port
    # With an empty ssl_ca_certs, redis-py uses the system's authorities.
    ca = {"authority": ANOTHER_CA, "unknown authority": ""}.get(wrong, CA)
    host = "localhost" if wrong == "name" else "127.0.0.1"
    with relayed(tls_redis, ca, host) as module, plain(tls_redis) as cache:
        for _ in range(3):
            assert [module.planet(1)] == module.fetch(SQL) == [MERCURY]
        assert not cache.keys()
        (warning,) = warnings(caplog, module, tls_redis.password)
        assert "certificate" in warning or wrong == "no TLS"


@pytest.mark.parametrize("ca", [CA, ""], ids=["verified", "without DB_SSL_CA"])
def test_mysql_is_used_over_tls_if_it_offers_that(ca, tls_mysql, cache):
    with relayed(tls_mysql, ca) as module:
        assert [module.planet(1)] == module.fetch(SQL) == [MERCURY]
        assert module.save_planet(9, "Pluto") == {"id": 9, "name": "Pluto"}
        assert module.query("SHOW STATUS LIKE 'Ssl_cipher'")[0]["Value"]


@pytest.mark.parametrize("wrong", ["authority", "name", "no TLS"])
def test_a_mysql_that_is_not_verified_is_refused(wrong, tls_mysql, mysql_server, cache):
    server = mysql_server if wrong == "no TLS" else tls_mysql
    ca = ANOTHER_CA if wrong == "authority" else CA
    host = "localhost" if wrong == "name" else "127.0.0.1"
    with relayed(server, ca, host) as module:
        for function, *args in (module.planet, 1), (module.save_planet, 1, "Stolen"):
            with pytest.raises(pymysql.err.OperationalError):
                function(*args)
        assert not cache.exists("planet:1")
