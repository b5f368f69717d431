"""URLs, sizes, addresses and the environment."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuremote.config import (
    DEFAULT_PORT,
    Settings,
    Target,
    format_address,
    parse_address,
    parse_size,
    parse_url,
)
from gpuremote.errors import ConfigError, InvalidURL

GIB = 1 << 30


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("gpu://node1:7701", Target("gpu", "node1", 7701)),
        ("gpu://node1", Target("gpu", "node1", DEFAULT_PORT)),
        ("gpu://node1/", Target("gpu", "node1")),
        ("gpu://10.0.0.7:1", Target("gpu", "10.0.0.7", 1)),
        ("gpu://[::1]:65535", Target("gpu", "::1", 65535)),
        ("gpu://[fe80::1%25eth0]", Target("gpu", "fe80::1%eth0")),
        ("gpu://h?transport=tcp", Target("gpu", "h", transport="tcp")),
        ("gpu://h?require=rdma", Target("gpu", "h", require="rdma")),
        ("gpu://h?transport=shm&require=shm", Target("gpu", "h", transport="shm", require="shm")),
        (
            "gpu://h:9?connect_timeout=2.5&grace=0&memory=1GiB",
            Target("gpu", "h", 9, connect_timeout=2.5, grace=0.0, memory=GIB),
        ),
        ("gpu://h?lanes=auto&compression=auto", Target("gpu", "h")),
        ("gpu://h?lanes=16", Target("gpu", "h", lanes=16)),
        ("local://?lanes=1&compression=off", Target("local", lanes=1, compression="off")),
        ("gpu://h?compression=lz4", Target("gpu", "h", compression="lz4")),
        ("gpu://h?dedupe=on", Target("gpu", "h", dedupe="on")),
        ("gpu://h?tls=on", Target("gpu", "h", tls=True)),
        ("gpu://h?tls=0", Target("gpu", "h", tls=False)),
        (
            "gpu://h?cafile=my%20ca.pem&certfile=/c.pem&keyfile=/k.pem",
            Target("gpu", "h", cafile="my ca.pem", certfile="/c.pem", keyfile="/k.pem"),
        ),
        ("local://", Target("local")),
        (
            "local://?backend=numpy&devices=4&memory=1.5GiB",
            Target("local", backend="numpy", devices=4, memory=3 * GIB // 2),
        ),
        ("pool://p:80", Target("pool", "p", 80)),
        (
            "pool://p?count=2&memory=8GiB&model=H100%20SXM&zone=a%26b",
            Target(
                "pool",
                "p",
                count=2,
                memory=8 * GIB,
                labels=(("model", "H100 SXM"), ("zone", "a&b")),
            ),
        ),
    ],
)
def test_url(url: str, target: Target) -> None:
    assert parse_url(url) == target


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "no '://'"),
        ("node1:7700", "write gpu://HOST:PORT"),
        ("gpu:/node1", "no '://'"),
        ("cpu://node1", "unknown scheme 'cpu', did you mean 'gpu'?"),
        ("http://node1", "unknown scheme 'http'; known: gpu, local, pool"),
        ("GPU://node1", "unknown scheme 'GPU'"),
        ("gpu://", "no host"),
        ("gpu://:7700", "no host"),
        ("gpu://node1:", "port '' is not a number from 1 to 65535"),
        ("gpu://node1:0", "port '0' is not a number from 1 to 65535"),
        ("gpu://node1:65536", "port '65536'"),
        ("gpu://node1:-1", "port '-1'"),
        ("gpu://node1:77oo", "port '77oo'"),
        ("gpu://node1:\u0667", "port '\u0667'"),
        ("gpu://node1:" + "9" * 5000, "is not a number"),
        ("gpu://no de1", "is no host name"),
        ("gpu://" + "h" * 300, "is no host name"),
        ("gpu://::1", "stands in brackets: [::1]"),
        ("gpu://[::1", "no ']'"),
        ("gpu://[node1]:1", "'node1' is no IPv6 address"),
        ("gpu://[::1]7700", "expected ':PORT' after ']'"),
        ("gpu://node1/models", "has no path, got '/models'"),
        ("gpu://node1#x", "'#' has no meaning"),
        ("local://node1", "takes no host; to reach a running server write gpu://node1"),
        ("gpu://h?", "write NAME=VALUE"),
        ("gpu://h?transport", "'transport' is no option; write NAME=VALUE"),
        ("gpu://h?transport=", "'transport=' is no option"),
        ("gpu://h?=tcp", "'=tcp' is no option"),
        ("gpu://h?grace=1&", "write NAME=VALUE"),
        ("gpu://h?grace=1&grace=1", "option 'grace' is given twice"),
        ("pool://h?zone=1&zone=2", "option 'zone' is given twice"),
        ("gpu://h?transport=tcp&require=rdma", "transport=tcp and require=rdma contradict"),
        ("gpu://h?transport=TCP", "option transport='TCP': expected a name"),
        ("gpu://h?connect_timeout=0", "option connect_timeout='0': expected more than 0 seconds"),
        ("gpu://h?connect_timeout=nan", "expected seconds"),
        ("gpu://h?connect_timeout=1e9", "expected seconds"),
        ("gpu://h?lanes=0", "option lanes='0': expected auto or a whole number from 1 to 16"),
        ("gpu://h?lanes=17", "expected auto or a whole number from 1 to 16"),
        ("gpu://h?lanes=many", "expected auto or a whole number from 1 to 16"),
        ("gpu://h?lanes=1.5", "expected auto or a whole number from 1 to 16"),
        ("gpu://h?compression=gzip", "expected one of auto, off, lz4, zstd"),
        ("gpu://h?dedupe=yes", "expected one of auto, on, off"),
        ("gpu://h?grace=100000", "expected 0 to 86400 seconds"),
        ("gpu://h?grace=-1", "expected seconds"),
        ("gpu://h?devices=2", "unknown option 'devices'"),
        ("gpu://h?count=2", "unknown option 'count'"),
        ("gpu://h?tls=yes", "expected on or off"),
        ("gpu://h?cafile=a%00b", "expected the path of a file"),
        ("gpu://h?tls=off&cafile=ca.pem", "contradict each other"),
        ("gpu://h?keyfile=key.pem", "keyfile needs certfile"),
        ("local://?cafile=ca.pem", "unknown option 'cafile'"),
        ("local://?devices=0", "expected a whole number from 1 to 1024"),
        ("local://?devices=two", "expected a whole number"),
        ("local://?memory=0", "expected more than 0 bytes"),
        ("local://?memory=8G", "write 8GiB (units of 1024) or 8GB (of 1000)"),
        ("pool://h?count=0", "option count='0'"),
    ],
)
def test_bad_url(url: str, text: str) -> None:
    with pytest.raises(InvalidURL) as caught:
        parse_url(url)
    assert text in str(caught.value)


def test_unknown_option_names_the_closest_and_all_known() -> None:
    with pytest.raises(InvalidURL) as caught:
        parse_url("gpu://node1?tranport=tcp")
    assert str(caught.value) == (
        "'gpu://node1?tranport=tcp': unknown option 'tranport', did you mean 'transport'? "
        "known: transport, require, connect_timeout, grace, memory, lanes, compression, dedupe, "
        "tls, cafile, certfile, keyfile"
    )


def test_a_password_is_not_repeated_in_the_error() -> None:
    with pytest.raises(InvalidURL) as caught:
        parse_url("gpu://me:secret@node1")
    assert "secret" not in str(caught.value)


@given(st.text(max_size=60) | st.from_regex(r"(gpu|local|pool)://\S{0,40}", fullmatch=True))
def test_any_text_is_a_target_or_an_invalid_url(url: str) -> None:
    try:
        target = parse_url(url)
    except InvalidURL:
        pass
    else:
        assert bool(target.host) is (target.scheme != "local")
        assert 1 <= target.port <= 65535


def test_a_target_does_not_change() -> None:
    target, name = parse_url("gpu://node1"), "port"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(target, name, 1)


@pytest.mark.parametrize(
    ("url", "address"),
    [("gpu://node1", "node1:7700"), ("gpu://[::1]:9", "[::1]:9"), ("local://", "")],
)
def test_target_address(url: str, address: str) -> None:
    assert parse_url(url).address == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("node1", ("node1", DEFAULT_PORT)),
        ("[::]:7701", ("::", 7701)),
        ("[::1]", ("::1", DEFAULT_PORT)),
    ],
)
def test_address(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", ":7700", "node1:", "node1:99999", "::1", "[::1", "a b:1"])
def test_bad_address(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    assert not isinstance(caught.value, InvalidURL)
    assert repr(text) in str(caught.value)


@given(
    st.sampled_from(["node1", "10.0.0.1", "::1", "fe80::2"]),
    st.integers(min_value=0, max_value=65535),
)
def test_an_address_that_was_written_is_read_again(host: str, port: int) -> None:
    assert parse_address(format_address(host, port)) == (host, port)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1B", 1),
        ("8GiB", 8 * GIB),
        ("8gib", 8 * GIB),
        (" 8 GiB ", 8 * GIB),
        ("1.5KiB", 1536),
        ("0.1KiB", 102),
        ("512MB", 512_000_000),
        ("1TB", 10**12),
        ("2TiB", 2 << 40),
        # Exact, where a float would round to 2**63.
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no size"),
        ("GiB", "is no size"),
        ("-1GiB", "is no size"),
        ("1e9", "is no size"),
        ("inf", "is no size"),
        ("1,5GiB", "is no size"),
        ("9" * 5000, "is no size"),
        ("\u0663GiB", "is no size"),
        ("8g", "write 8GiB (units of 1024) or 8GB (of 1000)"),
        ("8 bits", "unknown unit 'bits'; use KiB"),
        ("9223372036854775808", "is more than"),
        ("99999999TiB", "is more than"),
    ],
)
def test_bad_size(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert message in str(caught.value)


def test_settings_of_an_empty_environment() -> None:
    assert Settings.from_env({}) == Settings("local://", "error", "", 2)
    empty = dict.fromkeys(
        ("GPUREMOTE_URL", "GPUREMOTE_DOWNLOAD", "GPUREMOTE_DEBUG", "GPUREMOTE_STACK"), ""
    )
    assert Settings.from_env(empty) == Settings()


def test_settings() -> None:
    environ = {
        "GPUREMOTE_URL": " gpu://node1 ",
        "GPUREMOTE_DOWNLOAD": "warn",
        "GPUREMOTE_DEBUG": "sync",
        "GPUREMOTE_STACK": "0",
        "PATH": "/bin",
    }
    assert Settings.from_env(environ) == Settings("gpu://node1", "warn", "sync", 0)


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("GPUREMOTE_DOWNLOAD", "alow", "did you mean 'allow'? known: error, warn, allow"),
        ("GPUREMOTE_DEBUG", "1", "GPUREMOTE_DEBUG='1'; known: sync"),
        ("GPUREMOTE_STACK", "-1", "a number of stack frames from 0 to 64"),
        ("GPUREMOTE_STACK", "65", "GPUREMOTE_STACK='65'"),
        ("GPUREMOTE_STACK", "deep", "GPUREMOTE_STACK='deep'"),
    ],
)
def test_bad_setting(variable: str, value: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({variable: value})
    assert variable in str(caught.value)
    assert text in str(caught.value)


def test_bad_url_in_the_environment_names_the_variable() -> None:
    with pytest.raises(InvalidURL, match=r"^GPUREMOTE_URL: .*unknown scheme"):
        Settings.from_env({"GPUREMOTE_URL": "ftp://node1"})
