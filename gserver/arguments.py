"""How the words after a command become the arguments of its handler.

The signature of the handler says it: its parameters after the first take the words, in order. Their
annotations are their types: `str`, which is the default, `int` or `float`; `*words` takes the rest.
This module is pure.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a handler takes after the request.

    `usage` is how people write it: `name [port] [words ...]`.
    """

    #: Each turns a word into an argument, or raises ValueError.
    parsers: tuple[Callable[[str], Any], ...] = ()
    #: How many of them must be given.
    required: int = 0
    #: Parses each word of `*words`; None without such a parameter.
    rest: Callable[[str], Any] | None = None
    usage: str = ""

    @property
    def takes_words(self) -> bool:
        """Whether words may follow the command."""
        return bool(self.parsers or self.rest)

    def parse(self, words: Sequence[str]) -> tuple[Any, ...] | None:
        """Return the arguments; None if number or types are wrong, or a word is not printable."""
        named = len(self.parsers)
        if len(words) < self.required or (len(words) > named and not self.rest):
            return None
        if not all(word.isascii() and word.isprintable() for word in words):
            return None
        parsers = [*self.parsers[: len(words)], *[self.rest or str] * (len(words) - named)]
        try:
            return tuple(parse(word) for parse, word in zip(parsers, words, strict=True))
        except ValueError:
            return None


def parameters_of(handler: Callable[..., object]) -> Parameters:
    """Return what a handler takes after its first argument, the request.

    Raises TypeError with the end of a sentence that begins with the handler's name.
    """
    signature = _signature(handler)
    if signature is None:
        return Parameters()
    others = list(signature.parameters.values())
    kind = others[0].kind if others else Parameter.VAR_KEYWORD
    if kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD):
        raise TypeError("must take the request first, as in def handler(request)")
    if kind is not Parameter.VAR_POSITIONAL:  # Else the request is one of them.
        del others[0]
    parsers, usage, required, rest = [], [], 0, None
    for parameter in others:
        parse = _parser(parameter)
        if parameter.kind is Parameter.VAR_POSITIONAL:
            rest = parse
            usage.append(f"[{parameter.name} ...]")
        elif parse:
            parsers.append(parse)
            is_required = parameter.default is Parameter.empty
            required += is_required
            usage.append(parameter.name if is_required else f"[{parameter.name}]")
    return Parameters(tuple(parsers), required, rest, " ".join(usage))


def _signature(handler: Callable[..., object]) -> Signature | None:
    """Return the signature; None for a function written in C that has none.

    A decorator may have added or removed arguments, so the function that it wraps counts only if
    the decorator passes on whatever it is given.
    """
    try:
        own = inspect.signature(handler, follow_wrapped=False)
        kinds = [parameter.kind for parameter in own.parameters.values()]
        passes_on = kinds[:1] == [Parameter.VAR_POSITIONAL]
        return inspect.signature(handler) if passes_on else own
    except ValueError:
        return None


def _parser(parameter: Parameter) -> Callable[[str], Any] | None:
    """Return what makes an argument of a word; None for a parameter that takes no word."""
    if parameter.kind is Parameter.VAR_KEYWORD:
        return None
    if parameter.kind is Parameter.KEYWORD_ONLY:
        if parameter.default is Parameter.empty:
            raise TypeError(f"has the keyword-only parameter {parameter.name}: no word can set it")
        return None
    if not parameter.name.isascii():
        raise TypeError(f"has the parameter {parameter.name}: use ASCII, since clients read it")
    name = _type_name(parameter.annotation)
    if name not in _PARSERS:
        raise TypeError(
            f"has the parameter {parameter.name} of the type {name}: use str, int or float"
        )
    return _PARSERS[name]


def _type_name(annotation: object) -> str:
    """Return the type that an annotation names. It may be a string (PEP 563)."""
    if annotation is Parameter.empty:
        return "str"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _whole(word: str) -> int:
    """Return a decimal number. Unlike `int`, it takes neither `1_000` nor blanks."""
    if not re.fullmatch(r"[+-]?[0-9]+", word):
        raise ValueError("not a whole number")
    return int(word)


def _number(word: str) -> float:
    """Return a finite number. Unlike `float`, it takes neither `1_000` nor `nan` nor `inf`."""
    number = float(word)
    if "_" in word or not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


_PARSERS: dict[str, Callable[[str], Any]] = {"str": str, "int": _whole, "float": _number}
