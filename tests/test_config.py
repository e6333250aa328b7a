"""The options as data: names, limits and parsed values. Nothing is started here."""

import json
import re
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gserver.config import (
    OPTIONS,
    Config,
    environment_names,
    flag,
    parse_admin_url,
    parse_server_id,
    parse_statsd_prefix,
    parse_workers,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("port", "--port"),
        ("max_line_bytes", "--max-line-bytes"),
        ("line_timeout_seconds", "--line-timeout"),
        ("unterminated_after_seconds", "--unterminated-after"),
    ],
)
def test_a_flag_is_the_name_with_dashes_and_without_seconds(name: str, expected: str) -> None:
    assert flag(name) == expected


def test_no_two_options_share_a_flag_or_a_variable() -> None:
    flags = [flag(name) for name in OPTIONS]
    variables = [variable for name in OPTIONS for variable in environment_names(name)]
    assert len(set(flags)) == len(flags) == len(fields(Config))
    assert len(set(variables)) == len(variables)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("host", "127.0.0.1"),
        ("port", 4242),
        ("workers", 1),
        ("max_line_bytes", 1024),
        ("line_timeout_seconds", 10.0),
        ("idle_timeout_seconds", 0.0),
        ("write_timeout_seconds", 10.0),
        ("unterminated_after_seconds", 0.1),
    ],
)
def test_the_defaults(name: str, expected: object) -> None:
    assert getattr(Config(), name) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_every_default_is_within_the_limits_of_its_option(name: str) -> None:
    option, default = OPTIONS[name], getattr(Config(), name)
    assert isinstance(default, str) or option.minimum <= default
    assert option.maximum is None or default <= option.maximum
    assert not option.choices or default in option.choices
    assert (
        option.parse is None
        or default == ""
        or option.parse(option.shown_default or str(default)) == default
    )


@pytest.mark.parametrize(("text", "expected"), [("auto", 0), ("1", 1), ("2", 2), ("256", 256)])
def test_workers_are_a_number_or_auto(text: str, expected: int) -> None:
    assert parse_workers(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "257", "-1", "+1", "1.5", " 2", "2 ", "AUTO", "two", "٣", "²", "9" * 5000]
)
def test_any_other_number_of_workers_is_refused_with_the_valid_values(text: str) -> None:
    with pytest.raises(ValueError, match=r"is neither a number from 1 to 256 nor auto$"):
        parse_workers(text)


@pytest.mark.parametrize("text", ["a", "!", "~", "d1b2f0ce-8f1f-4f9e-9d59-0a4bb3b0a9d4", "x" * 128])
def test_a_word_of_printable_ascii_is_a_server_id(text: str) -> None:
    assert parse_server_id(text) == text


@pytest.mark.parametrize("text", ["", " ", "a b", "a\n", "\ta", "a\0", "\x7f", "é", "x" * 129])
def test_a_server_id_that_could_not_be_a_reply_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match="is not one word of at most 128 printable ASCII characters"
    ):
        parse_server_id(text)


@pytest.mark.parametrize("text", ["http://h", "https://[::1]:4243/a?b#c", "http://h/" + "x" * 118])
def test_a_url_of_http_is_the_url_of_a_page(text: str) -> None:
    assert parse_admin_url(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "h:1", "ftp://h", "javascript:alert(1)", "http:h", "http://", "http:///a"),
        *("http://h:0", "http://h:65536", "http://h:x", "http://[::1", "http://h a", "http://é"),
        *("http://hush:hush@h", "http://hush@h", "http://h/" + "x" * 119, "http://h\n"),
    ],
)
def test_any_other_url_of_a_page_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match=r"^the URL ") as refused:
        parse_admin_url(text)
    assert "hush" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gserver", "gserver"),
        ("prod.eu-1.gserver_2", "prod.eu-1.gserver_2"),
        (".prod.", "prod"),
        ("a:b|c@d#e", "a_b_c_d_e"),
        ("a b\nc", "a_b_c"),
        ("é", "_"),
        ("", ""),
    ],
)
def test_characters_that_would_break_a_statsd_line_become_underscores(
    text: str, expected: str
) -> None:
    assert parse_statsd_prefix(text) == expected


@given(st.text(max_size=40))
def test_no_prefix_can_break_a_statsd_line(text: str) -> None:
    prefix = parse_statsd_prefix(text)
    assert re.fullmatch(r"[A-Za-z0-9_.-]*", prefix)
    assert not prefix.startswith(".")
    assert not prefix.endswith(".")


def test_statsd_a_cluster_and_an_admin_port_need_an_agent() -> None:
    assert not Config().needs_agent
    assert not Config(statsd_port=1234, statsd_prefix="x").needs_agent
    assert Config(statsd_host="localhost").needs_agent
    assert Config(redis_url="redis://localhost").needs_agent
    assert Config(admin_port=0).needs_agent


def test_a_worker_gets_no_secret() -> None:
    config = Config(redis_url="redis://bob:hush@redis.example", admin_token="quiet", workers=3)
    expected = replace(config, redis_url="redis://redis.example:6379", admin_token="")
    assert config.for_worker() == expected
    assert replace(config, redis_url="").for_worker().redis_url == ""


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().port = 1  # type: ignore[misc]


def test_a_configuration_survives_a_round_trip_through_json() -> None:
    config = replace(
        Config(), workers=3, server_id="x", idle_timeout_seconds=0.25, statsd_host="::1"
    )
    assert Config(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("host", "admin_host", "collides"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("10.0.0.1", "0.0.0.0", True),
        ("::", "127.0.0.1", True),
        ("::1", "::", True),
        ("localhost", "127.0.0.1", True),
        ("::1", "localhost", True),
        ("a.example", "a.example", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("0.0.0.0", "::1", False),
        ("::1", "127.0.0.1", False),
        ("a.example", "127.0.0.1", False),
    ],
)
def test_one_port_collides_only_if_the_addresses_overlap(
    host: str, admin_host: str, collides: bool
) -> None:
    config = Config(host=host, admin_host=admin_host, port=4242, admin_port=4242)
    assert bool(config.port_collision) is collides
    assert not replace(config, admin_port=4243).port_collision
    assert not replace(config, port=0, admin_port=0).port_collision
