"""What is public says what it takes, gives and raises, with shapes and an example."""

import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import lightning_curv

DOORS = (
    "lightning_curv",
    "lightning_curv.extensions",
    "lightning_curv.optimizers",
    "lightning_curv.callbacks",
    "lightning_curv.metrics",
    "lightning_curv.rules",
    "lightning_curv.losses",
    "lightning_curv.terms",
)
ROOMS = ("lightning_curv", "optimizers", "callbacks")
SECTION = r"^\s*(Args|Returns|Yields|Raises|Examples?|Attributes):\s*$"


def exported():
    """Every class and function that a door exports, once, by its shortest name."""
    found = {}
    for door in DOORS:
        module = importlib.import_module(door)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found.setdefault(value, f"{door}.{name}")
    return {name: value for value, name in found.items()}


PUBLIC = exported()


def methods():
    """Public methods that a public class is the first to have: others are documented where they were declared."""
    for name, value in PUBLIC.items():
        for key, member in vars(value).items() if inspect.isclass(value) else ():
            function = getattr(member, "__func__", member)
            if key in getattr(value, "__dataclass_fields__", ()):
                continue  # a field whose default is a function
            inherited = any(key in vars(base) for base in value.__mro__[1:])
            if inspect.isfunction(function) and not key.startswith("_") and not inherited:
                yield f"{name}.{key}", function


METHODS = dict(methods())


def sections(value):
    return set(re.findall(SECTION, inspect.getdoc(value) or "", re.MULTILINE))


def arguments(value):
    signature = inspect.signature(value.__init__ if inspect.isclass(value) else value)
    return [name for name in signature.parameters if name not in ("self", "cls", "args", "kwargs")]


def missing(name, function):
    """Sections that the docstring of a function should have and has not."""
    found, source = sections(function), textwrap.dedent(inspect.getsource(function))
    returned = inspect.signature(function).return_annotation
    if arguments(function) and "Args" not in found:
        yield "Args"
    if returned not in (inspect.Signature.empty, None, "None") and not found & {
        "Returns",
        "Yields",
    }:
        yield "Returns"
    if re.search(r"^\s*raise \w", source, re.MULTILINE) and "Raises" not in found:
        yield "Raises"


@pytest.mark.parametrize("name", METHODS)
def test_methods_say_what_they_take_give_and_raise(name):
    assert not [*missing(name, METHODS[name])]


@pytest.mark.parametrize("name", PUBLIC)
def test_classes_and_functions_say_what_they_take_and_show_an_example(name):
    value = PUBLIC[name]
    lacking = [] if inspect.isclass(value) else [*missing(name, value)]
    if inspect.isclass(value) and arguments(value) and not sections(value) & {"Args", "Attributes"}:
        lacking.append("Args")
    if not sections(value) & {"Example", "Examples"}:
        lacking.append("Example")
    assert not lacking


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_described(name):
    value = PUBLIC[name]
    documentation = inspect.getdoc(value) or ""
    undescribed = [
        key
        for key in arguments(value)
        if not re.search(rf"^\s*\*{{0,2}}`*{key}\b.*:", documentation, re.MULTILINE)
    ]
    assert not undescribed


def entries(value):
    """Names and descriptions of the arguments, attributes and errors in a docstring."""
    section = None
    for line in (inspect.getdoc(value) or "").splitlines():
        if line and not line.startswith(" "):
            title = re.fullmatch(r"(\w+):", line)
            section = title and title[1]
        entry = re.match(r"    (\S+): (.*)", line)
        if section in ("Args", "Attributes", "Raises") and entry:
            yield entry[1], entry[2]


@pytest.mark.parametrize("name", {**PUBLIC, **METHODS})
def test_descriptions_begin_with_a_capital_or_a_symbol(name):
    described = dict(entries({**PUBLIC, **METHODS}[name]))
    assert {key: text for key, text in described.items() if re.match("[a-z]{2}", text)} == {}


def test_mathematics_is_written_between_dollars():
    root = Path(lightning_curv.__file__).parents[1]
    sources = [path for room in ROOMS for path in (root / room).rglob("*.py")]
    assert len(sources) > 200
    # A formula of its own ends at its dollars: nothing of it is left behind them.
    wrong = r":math:|\.\. math::|\$\$\n *[^\s\"]"
    assert [path for path in sources if re.search(wrong, path.read_text())] == []
