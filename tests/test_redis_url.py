"""The Redis URL: every form, every error, and no secret in any text."""

import traceback
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gserver.redis_url import RedisUrl, parse_urls
from lab.running import argv

HERE = (("127.0.0.1", 6379),)
#: A URL, its parts, and its form in logs.
FORMS: dict[str, tuple[RedisUrl, str]] = {
    "redis://127.0.0.1": (RedisUrl(HERE), "redis://127.0.0.1:6379"),
    "redis://127.0.0.1/": (RedisUrl(HERE), "redis://127.0.0.1:6379"),
    "redis://127.0.0.1:7000": (RedisUrl((("127.0.0.1", 7000),)), "redis://127.0.0.1:7000"),
    "redis://redis.internal:65535": (
        RedisUrl((("redis.internal", 65535),)),
        "redis://redis.internal:65535",
    ),
    "REDIS://Redis_1": (RedisUrl((("Redis_1", 6379),)), "redis://Redis_1:6379"),
    "redis://127.0.0.1/3": (RedisUrl(HERE, db=3), "redis://127.0.0.1:6379/3"),
    "redis://127.0.0.1?db=15": (RedisUrl(HERE, db=15), "redis://127.0.0.1:6379/15"),
    "redis://127.0.0.1/3?db=15": (RedisUrl(HERE, db=15), "redis://127.0.0.1:6379/15"),
    "redis://:hush@127.0.0.1": (RedisUrl(HERE, password="hush"), "redis://127.0.0.1:6379"),
    "redis://bob@127.0.0.1": (RedisUrl(HERE, username="bob"), "redis://127.0.0.1:6379"),
    "redis://bob:hush@127.0.0.1": (
        RedisUrl(HERE, username="bob", password="hush"),
        "redis://127.0.0.1:6379",
    ),
    "redis://b%40b:h%3Au%2Fs%25h+%C3%A9@127.0.0.1": (
        RedisUrl(HERE, username="b@b", password="h:u/s%h+é"),
        "redis://127.0.0.1:6379",
    ),
    "redis://:h:u@s:h@127.0.0.1": (RedisUrl(HERE, password="h:u@s:h"), "redis://127.0.0.1:6379"),
    "redis://127.0.0.1?username=bob&password=h%26sh": (
        RedisUrl(HERE, username="bob", password="h&sh"),
        "redis://127.0.0.1:6379",
    ),
    "redis://eve:old@127.0.0.1?password=hush": (
        RedisUrl(HERE, username="eve", password="hush"),
        "redis://127.0.0.1:6379",
    ),
    "redis://[::1]": (RedisUrl((("::1", 6379),)), "redis://[::1]:6379"),
    "redis://:hush@[2001:db8::1]:7000/2": (
        RedisUrl((("2001:db8::1", 7000),), db=2, password="hush"),
        "redis://[2001:db8::1]:7000/2",
    ),
    "rediss://127.0.0.1": (RedisUrl(HERE, has_tls=True), "rediss://127.0.0.1:6379"),
    "rediss://bob:hush@redis.internal:7000/1": (
        RedisUrl((("redis.internal", 7000),), has_tls=True, db=1, username="bob", password="hush"),
        "rediss://redis.internal:7000/1",
    ),
    "unix:///run/redis.sock": (RedisUrl(path="/run/redis.sock"), "unix:///run/redis.sock"),
    "unix:///s": (RedisUrl(path="/s"), "unix:///s"),
    "unix:///run/a%20b?db=4": (RedisUrl(path="/run/a b", db=4), "unix:///run/a b?db=4"),
    "unix://bob:hush@/run/redis.sock": (
        RedisUrl(path="/run/redis.sock", username="bob", password="hush"),
        "unix:///run/redis.sock",
    ),
    "unix:///run/redis.sock?password=hush": (
        RedisUrl(path="/run/redis.sock", password="hush"),
        "unix:///run/redis.sock",
    ),
    "redis+sentinel://one/s?db=3&username=a&password=hush&sentinel_username=c&sentinel_password=": (
        RedisUrl(
            (("one", 26379),), "s", db=3, username="a", password="hush", sentinel_username="c"
        ),
        "redis+sentinel://one:26379/s/3",
    ),
    "redis+sentinel://one/name": (
        RedisUrl((("one", 26379),), "name"),
        "redis+sentinel://one:26379/name",
    ),
    "redis+sentinel://one:1,two,[::1],[::2]:4/my-name/5": (
        RedisUrl((("one", 1), ("two", 26379), ("::1", 26379), ("::2", 4)), "my-name", db=5),
        "redis+sentinel://one:1,two:26379,[::1]:26379,[::2]:4/my-name/5",
    ),
    "redis+sentinel://one/name?db=5": (
        RedisUrl((("one", 26379),), "name", db=5),
        "redis+sentinel://one:26379/name/5",
    ),
    "rediss+sentinel://bob:hush@one,two/name?sentinel_username=eve&sentinel_password=quiet": (
        RedisUrl(
            (("one", 26379), ("two", 26379)), "name", "", True, 0, "bob", "hush", "eve", "quiet"
        ),
        "rediss+sentinel://one:26379,two:26379/name",
    ),
}

ERRORS = {
    "": "must begin with",
    "redis": "must begin with",
    "127.0.0.1:6379": "must begin with",
    "http://127.0.0.1": "must begin with",
    "sentinel://127.0.0.1/name": "must begin with",
    "+sentinel://127.0.0.1/name": "must begin with",
    "unix+sentinel:///run/redis.sock": "must begin with",
    "redis+sentinel+sentinel://127.0.0.1/name": "must begin with",
    "redis://[::1": "host or port",
    "redis://one%2Ftwo": "host or port",
    "redis://one%3A1": "host or port",
    "redis://127.0.0.1?db": "name=value",
    "redis://127.0.0.1?timeout=1": "unknown parameter",
    "redis://127.0.0.1?DB=1": "unknown parameter",
    "redis://": "host or port",
    "redis://:6379": "host or port",
    "redis:///3": "host or port",
    "redis://127.0.0.1:": "host or port",
    "redis://127.0.0.1:0": "host or port",
    "redis://127.0.0.1:65536": "host or port",
    "redis://127.0.0.1:+1": "host or port",
    "redis://127.0.0.1:port": "host or port",
    "redis://::1": "host or port",
    "redis://a b": "host or port",
    "redis://a\ab": "not a valid URL",
    "redis://a/\ab": "not a valid URL",
    "redis+sentinel://one,,two/name": "host or port",
    "redis+sentinel://one,two,/name": "host or port",
    "redis+sentinel://one": "no service",
    "redis+sentinel://one/": "no service",
    "redis+sentinel://one//3": "no service",
    "redis://one,two": "several hosts",
    "redis://one?sentinel_password=x": "need redis\\+sentinel://",
    "unix:///x?sentinel_username=x": "need redis\\+sentinel://",
    "rediss://one,two/3": "several hosts",
    "redis://127.0.0.1/x": "not a number",
    "redis://127.0.0.1/-1": "not a number",
    "redis://127.0.0.1/1/2": "not a number",
    "redis://127.0.0.1/123456": "not a number",
    "redis://127.0.0.1?timeout=": "unknown parameter",
    "redis://127.0.0.1?db=x": "not a number",
    "redis+sentinel://one/name/x": "not a number",
    "unix:///run/redis.sock?db=x": "not a number",
    "unix://": "no absolute path",
    "unix:///": "no absolute path",
    "unix://redis.sock": "no absolute path",
}

#: A percent-encoded password may contain anything. It is long, so no text contains it by chance.
SECRET = st.text(min_size=8).map(lambda text: f"Hush{text}")
SCHEME = st.sampled_from(["redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel"])
#: Texts that look like such URLs, or almost.
URLISH = st.lists(
    st.sampled_from(
        [*"/:@?#&=,[]%+. \n\t\0é", *argv("redis unix s +sentinel :// one db password 1")]
    )
    | st.text(max_size=3),
    max_size=12,
).map("".join)


def all_text_of(error: BaseException) -> str:
    """Return the error and its causes, as a log shows them."""
    return "".join(traceback.format_exception_only(error)) + (
        all_text_of(error.__cause__) if error.__cause__ is not None else ""
    )


@pytest.mark.parametrize("text", FORMS)
def test_a_url_has_its_parts(text: str) -> None:
    assert RedisUrl.parse(text) == FORMS[text][0]


@pytest.mark.parametrize("text", FORMS)
def test_a_url_is_written_without_names_and_passwords(text: str) -> None:
    assert str(RedisUrl.parse(text)) == FORMS[text][1]


@pytest.mark.parametrize("text", FORMS)
def test_a_url_has_a_secret_if_it_has_a_password(text: str) -> None:
    assert RedisUrl.parse(text).has_secret == any(word in text for word in ("hush", "h:u", "h%"))


def test_the_sentinel_password_is_a_secret_too() -> None:
    assert RedisUrl.parse("redis+sentinel://one/name?sentinel_password=quiet").has_secret
    assert not RedisUrl.parse("redis+sentinel://one/name?sentinel_username=eve").has_secret


@pytest.mark.parametrize("text", ERRORS)
def test_an_invalid_url_is_an_error_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=ERRORS[text]) as caught:
        RedisUrl.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.outer
@given(scheme=SCHEME, username=SECRET, password=SECRET, is_in_query=st.booleans())
def test_any_name_and_password_can_be_percent_encoded_and_are_not_shown(
    scheme: str, username: str, password: str, is_in_query: bool
) -> None:
    name, word = quote(username, safe=""), quote(password, safe="")
    path = "/service" if scheme.endswith("l") else "/run/redis.sock" if scheme == "unix" else "/0"
    host = "" if scheme == "unix" else "one:1"
    login, query = (
        ("", f"?username={name}&password={word}") if is_in_query else (f"{name}:{word}@", "")
    )
    url = RedisUrl.parse(f"{scheme}://{login}{host}{path}{query}")
    assert (url.username, url.password) == (username, password)
    for secret in (username, password, name, word):
        assert secret not in str(url)


#: Unencoded passwords, with characters that a URL must encode.
RAW = st.text(st.sampled_from("Zz9/:@?#&=[]%+,;~'\"\\ é℀"), min_size=1, max_size=8)


@given(
    scheme=SCHEME,
    before=RAW,
    after=RAW,
    path=st.sampled_from(["", "/0", "/service", "/service/0", "/run/sock"]),
)
@example(scheme="redis", before="\u2100", after="9", path="")
@example(scheme="redis+sentinel", before="9/", after="9", path="/0")
@example(scheme="redis", before="9#", after="9", path="")
@example(scheme="unix", before="/", after="9", path="/run/sock")
def test_an_unencoded_password_is_never_shown(
    scheme: str, before: str, after: str, path: str
) -> None:
    try:
        url = RedisUrl.parse(f"{scheme}://Bobby:{before}Hush{after}@one:1{path}")
    except ValueError as error:
        shown = all_text_of(error)
    else:
        shown = str(url)
    assert "Hush" not in shown
    assert "Bobby" not in shown


@given(st.text() | URLISH | st.builds("{}://{}".format, SCHEME, URLISH))
@example("redis://one%0Atwo")
@example("redis+sentinel://one/na%0Ame")
@example("unix:///run/re%0Adis")
def test_any_text_is_a_url_or_an_error_that_fits_in_one_log_line(text: str) -> None:
    try:
        url = RedisUrl.parse(text)
    except ValueError as error:
        shown = f"{type(error).__name__} {error}"
    else:
        shown = str(url)
        assert bool(url.path) != bool(url.hosts)
        assert all(host and 0 < port < 65536 for host, port in url.hosts)
    assert shown.startswith(("redis", "unix:", "ValueError "))
    assert len(shown.splitlines()) == 1


def test_several_urls_have_blanks_between_them() -> None:
    found = parse_urls(" redis://a \n rediss://b:7000/2")
    assert list(map(str, found)) == ["redis://a:6379", "rediss://b:7000/2"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("redis://a redis://b redis://c redis://d", "there are 4 URLs, and at most 3 are allowed"),
        ("redis://a redis://a:6379", "two of the URLs are the same"),
        ("redis://:one@a redis://:two@a", "two of the URLs are the same"),
        ("redis://a http://b", "the URL must begin with redis://"),
        ("  ", "the URL must begin with redis://"),
    ],
)
def test_several_urls_that_are_wrong_have_one_clear_error(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_urls(text)
