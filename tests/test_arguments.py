"""Arguments of commands: what a signature says, and which words it accepts."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from gserver.arguments import parameters_of
from gserver.commands import Command, Request, command
from gserver.protocol import ErrorReply


def resolve(request: Request, name: str, port: int = 80) -> str:
    return f"{name!r} {port!r}"


def scale(request: Request, factor: float, *numbers: int) -> str:
    return f"{factor!r} {numbers!r}"


def echo(request: Request, *words: str) -> str:
    return repr(words)


def bare(request: Request) -> str:
    return "bare"


def untyped(request, first, second=2):  # type: ignore[no-untyped-def]
    return f"{first!r} {second!r}"


def postponed(request: "Request", number: "int") -> str:  # As with PEP 563.
    return repr(number)


@functools.wraps(resolve)
def passing_on(*arguments: Any, **named: Any) -> str:
    return resolve(*arguments, **named)


@functools.wraps(resolve)
def setting_all(request: Request) -> str:
    return resolve(request, "set", 1)


def bound(handler: Callable[..., Any], line: str) -> Command | ErrorReply:
    return command("NAP")(handler).bind(line.split())


ACCEPTED = {
    (resolve, "a.example"): "'a.example' 80",
    (resolve, "a.example 443"): "'a.example' 443",
    (resolve, "7 -1"): "'7' -1",
    (resolve, "x +07"): "'x' 7",
    (scale, "2"): "2.0 ()",
    (scale, "-.5e1 1 2 3"): "-5.0 (1, 2, 3)",
    (echo, ""): "()",
    (echo, "a b ~ 4"): "('a', 'b', '~', '4')",
    (bare, ""): "bare",
    (untyped, "1"): "'1' 2",
    (untyped, "1 3"): "'1' '3'",
    (postponed, "5"): "5",
    (passing_on, "a 5"): "'a' 5",
    (setting_all, ""): "'set' 1",
}


@pytest.mark.parametrize(("handler", "line"), ACCEPTED)
def test_words_become_the_arguments_of_the_handler(handler: Callable[..., Any], line: str) -> None:
    ready = bound(handler, line)
    assert isinstance(ready, Command)
    assert ready.answer(Request("here", lambda: 1)).decode() == ACCEPTED[handler, line] + "\n"


REFUSED = {
    resolve: ["", "a b", "a 1.5", "a 1_0", "a 0x10", "a 1 2", "a\0", "a\x7f", "a é", "é"],
    scale: ["", "x", "nan", "inf", "-inf", "1e999", "1_0", "1 a", "1 1.5"],
    bare: ["a"],
    untyped: ["", "1 2 3"],
    postponed: ["x"],
    passing_on: ["", "a b", "a 1 2"],
    setting_all: ["a"],
}


@pytest.mark.parametrize(
    ("handler", "line"), [(handler, line) for handler, lines in REFUSED.items() for line in lines]
)
def test_wrong_words_get_the_usage(handler: Callable[..., Any], line: str) -> None:
    error = bound(handler, line)
    assert isinstance(error, ErrorReply)
    assert (error.name, error.closes) == ("usage", False)
    usage = f"NAP {parameters_of(handler).usage}".rstrip()
    assert error.reply.decode() == f"ERR usage: {usage}\n"


def test_the_usage_shows_what_may_be_left_out() -> None:
    usages = {
        handler: parameters_of(handler).usage
        for handler in (resolve, scale, echo, bare, untyped, passing_on, setting_all)
    }
    assert usages == {
        resolve: "name [port]",
        scale: "factor [numbers ...]",
        echo: "[words ...]",
        bare: "",
        untyped: "first [second]",
        passing_on: "name [port]",
        setting_all: "",
    }


def test_a_keyword_that_no_word_can_set_is_left_out_of_the_usage() -> None:
    assert parameters_of(functools.partial(resolve, port=5)).usage == "name"

    def with_option(request: Request, *, loud: bool = False, **more: str) -> str:
        return "x"

    assert not parameters_of(with_option).takes_words
