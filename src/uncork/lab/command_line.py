"""Parses a command line into a command. Defaults in the help can be copied, and a mistake is reported in one line."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from uncork.lab.errors import LabError
from uncork.lab.terminal import say
from uncork.messages import close_to


def parse(kinds: Mapping[str, type], arguments: Sequence[str], about: str) -> Any:
    """The command that the arguments name, one of `kinds`; None where they asked for the help, which is printed.

    Raises:
        LabError: arguments that cannot be understood.
    """
    if {"-h", "--help"} & set(arguments):
        for kind in kinds.values():
            _explain(kind)
    out, err = _Captured(sys.stdout), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command = tyro.extras.subcommand_cli_from_dict(
                dict(kinds), prog="uncork", description=about, args=list(arguments)
            )
            _require_values(command, arguments)
            return command
    except SystemExit as end:
        if end.code:
            raise LabError(_mistake(kinds, arguments, err.getvalue())) from None
    said = out.getvalue().rstrip("\n")
    say(_wrapped(said) if {"-h", "--help"} & set(arguments) else said)  # else a script for completion
    for line in _long_defaults(kinds.get(next(iter(arguments), ""))):
        say(line)
    return None


def _wrapped(text: str) -> str:
    """A help whose paragraphs fit into the terminal; tyro leaves those above the boxes as they are in the source."""
    width = max(20, shutil.get_terminal_size().columns)

    def filled(paragraph: str) -> str:
        shown = re.sub(r"\x1b\[[0-9;]*m", "", paragraph)
        fits = all(len(line) <= width for line in shown.split("\n"))
        kept = fits or "│" in shown or shown.startswith("usage:")
        return paragraph if kept else textwrap.fill(" ".join(shown.split()), width)

    return "\n\n".join(map(filled, text.split("\n\n")))


@functools.cache
def _explain(kind: type) -> None:
    """Give tyro the docstrings of the command's fields as one line each: it breaks lines where the source does."""
    for owner in kind.__mro__[:-1]:
        hints = typing.get_type_hints(owner, include_extras=True)
        (found,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        body = found.body if isinstance(found, ast.ClassDef) else []
        for field, doc in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(doc, ast.Expr):
                text = ast.literal_eval(doc.value)
                if "\n" in text:
                    name, help_ = field.target.id, tyro.conf.arg(help=" ".join(text.split()))
                    hint: Any = typing.Annotated[hints[name], help_]
                    owner.__annotations__[name] = hint
                    kind.__dataclass_fields__[name].type = hint  # type: ignore[attr-defined]


def flag(name: str) -> str:
    """A field as the command line calls it.

    >>> flag("data_dir")
    '--data-dir'
    """
    return f"--{name.replace('_', '-')}"


def with_flags(message: str, command: Any) -> str:
    """An error's message with the command's flags (--data-dir) in place of the names of its fields (data_dir).

    At the beginning of the message every name of a field is replaced; elsewhere only one with an underscore.
    """
    positional = {f.name for f in dataclasses.fields(command) if _is_positional(type(command), f.name)}
    names = [f.name for f in dataclasses.fields(command) if f.name not in positional]
    if "head" not in names and "heads" in names and message.startswith("head "):
        message = "heads" + message.removeprefix("head")
    if message.startswith(("head ", "heads ")):
        message = f"--{message}"
    start = re.match(r"[\w-]+(?: and [\w-]+)*(?=:| must | needs )", message)
    if start:
        words = start[0].split(" and ")
        if all(word.replace("-", "_") in names for word in words):
            message = " and ".join(map(flag, words)) + message[start.end() :]
    for name in names:
        if "_" in name:
            message = re.sub(rf"(?<![^\s(]){name}(?=[\s,;)]|: |\.?$)", flag(name), message)
    return message


def _require_values(command: Any, arguments: Sequence[str]) -> None:
    """Raise LabError for an empty list, a list given in parts, an empty path, and a folder that would be in a file."""
    heads = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    for field in dataclasses.fields(command):
        name, value = flag(field.name), getattr(command, field.name)
        if value == () and field.default != ():
            raise LabError(f"{arguments[0]}: {name}: expected at least one value")
        if isinstance(value, tuple) and heads.count(name) > 1:  # the last one alone would count
            raise LabError(f"{arguments[0]}: {name} is given twice; write all its values after one {name}")
    for name, hint in typing.get_type_hints(type(command)).items():
        if Path in (hint, *typing.get_args(hint)) and _value(flag(name), arguments) == "''":
            raise LabError(f"{arguments[0]}: {flag(name)}: expected a path, got ''")
    folder: Path | None = getattr(command, "out_dir", None)
    above = [] if folder is None else [path for path in (folder, *folder.absolute().parents) if path.exists()]
    if above and not above[0].is_dir():
        raise LabError(f"{arguments[0]}: --out-dir: expected a folder, and {above[0]} is a file")


class _Captured(io.StringIO):
    """Keeps what is printed; has the real stream's encoding and isatty, by which tyro chooses its format."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    @property
    def encoding(self) -> Any:  # type: ignore[override]
        return getattr(self._stream, "encoding", None)


def _long_defaults(kind: type | None) -> list[str]:
    """Defaults that the help's box breaks over lines, each on one line that can be copied."""
    fields = dataclasses.fields(kind) if kind is not None else ()
    return [
        f"The default of {flag(f.name)}, to copy:\n{flag(f.name)} {' '.join(map(str, f.default))}"
        for f in fields
        if isinstance(f.default, tuple) and sum(len(str(item)) + 1 for item in f.default) > 40
    ]


def _mistake(kinds: Mapping[str, type], arguments: Sequence[str], said: str) -> str:
    """One line on what is wrong with the arguments; `said` is tyro's box."""
    first = next(iter(arguments), None)
    commands = f"(there are {', '.join(kinds)}; uncork --help explains them)"
    if first is None:
        return f"expected a command {commands}"
    if first not in kinds:
        what = "option" if first.startswith("-") else "command"
        return f"unrecognized {what} {first}{close_to(first, kinds)} {commands}"
    plain = " ".join(re.sub("[│╭╮╰╯─|]", " ", said).split())
    return f"{first}: {_wrong(kinds[first], arguments[1:], plain)} (uncork {first} --help lists the options)"


_NO_FLAG = {
    "--device": ": training takes the GPU where there is one (CUDA_VISIBLE_DEVICES= hides it), all else runs on the CPU"
}


def _wrong(kind: type, arguments: Sequence[str], said: str) -> str:
    fields = {flag(f.name): f for f in dataclasses.fields(kind) if not _is_positional(kind, f.name)}
    given = [a.partition("=")[0].replace("_", "-") for a in arguments if re.match(r"--?[A-Za-z]", a)]
    for name in given:
        if name not in fields and name.replace("--no-", "--", 1) not in fields:
            return f"unrecognized option {name}{_NO_FLAG.get(name) or close_to(name, fields)}"
    named = re.search(r"(?:Error parsing|for argument) '?(--[a-z-]+)", said)
    if named and named[1] in fields:
        hint = typing.get_type_hints(kind, include_extras=True)[fields[named[1]].name]
        given_value = _value(named[1], arguments)
        near = close_to(given_value.strip("'"), _choices(hint))
        return f"{named[1]}: expected {_expected(hint)}, got {given_value}{near}"
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in given:
            return f"{name} is required"
    for field in dataclasses.fields(kind):
        if _is_positional(kind, field.name) and field.default is dataclasses.MISSING and "Missing" in said:
            return f"{field.name.upper()} is required"
    stray = re.search(r"Unrecognized options: (\S+)", said)
    if stray:
        return f"unexpected argument {stray[1].rstrip(',')}; a value with spaces needs quotes"
    return said.partition(" For full helptext")[0]


def _is_positional(kind: type, name: str) -> bool:
    return tyro.conf.Positional in getattr(typing.get_type_hints(kind, include_extras=True)[name], "__metadata__", ())


def _value(name: str, arguments: Sequence[str]) -> str:
    """The last value that was given to the flag, as the user wrote it."""
    value = "nothing"
    for index, argument in enumerate(arguments):
        head, equals, text = argument.partition("=")
        if head.replace("_", "-") == name:
            words = [text] if equals else []
            for word in arguments[index + 1 :]:
                if word.startswith("--"):
                    break
                words.append(word)
            value = repr(" ".join(words)) if words else "nothing"
    return value


def _choices(hint: Any) -> list[str]:
    """The values that a type lists."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return [*map(str, inner)]
    return [choice for part in inner for choice in _choices(part)]


def _expected(hint: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (types.UnionType, typing.Union):
        if bool in inner:
            return "True, False or None"
        return " or ".join(_expected(part) for part in inner if part is not types.NoneType) + " or None"
    if origin is tuple:
        return f"{_expected(inner[0])}, or several"
    return {int: "a whole number", float: "a number", bool: "no value", str: "a text", Path: "a path"}[hint]
