"""Settings: the file, its bases and the command line become one model, and no mistake passes."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import Field

from megaspark import settings
from megaspark.errors import UserError
from megaspark.settings import Section, Tree, load, nearest, parse_override


class Inner(Section):
    rate: float = Field(0.5, gt=0)
    words: tuple[str, ...] = ()
    shares: dict[str, float] | None = None


class Outer(Section):
    name: str
    count: int = 3
    loud: bool = False
    inner: Inner = Inner()
    maybe: Inner | None = None


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides, Outer)
    message = str(caught.value)
    assert "\n" not in message, "an error is one line"
    return message


def test_the_last_word_wins(tmp_path):
    """A default that beats the file, a base that beats the file that names it, or a file that beats the command line."""
    write(tmp_path, "name: grandparent\ncount: 1\ninner: {rate: 1.0, words: [x]}\n", "g.yaml")
    write(tmp_path, "base: g.yaml\nname: parent\ninner: {rate: 2.0}\n", "p.yaml")
    path = write(tmp_path, "base: p.yaml\nname: child\n")
    found, tree = load(path, ["count=7", "inner.rate=4", "inner.rate=5"], Outer)
    assert found == Outer(name="child", count=7, inner=Inner(rate=5.0, words=("x",)))
    assert tree.place("name") == f"{path}:2"
    assert tree.place("inner.words") == f"{tmp_path / 'g.yaml'}:3"
    assert tree.place("inner.rate") == "command line: inner.rate=5"
    assert tree.place("loud") == "default"


def test_base_is_looked_for_beside_the_file_that_names_it(tmp_path, monkeypatch):
    """A chain over folders would read a file of the same name in the current folder."""
    write(tmp_path, "name: right\n", "deep/down/base.yaml")
    write(tmp_path, "base: down/base.yaml\n", "deep/mid.yaml")
    path = write(tmp_path, "base: deep/mid.yaml\n")
    write(tmp_path, "name: wrong\n", "cwd/down/base.yaml")
    monkeypatch.chdir(tmp_path / "cwd")
    assert load(path, [], Outer)[0].name == "right"


def test_circle_of_bases_is_named(tmp_path):
    """Two files that name each other would recurse until Python gives up."""
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    assert "a.yaml -> b.yaml -> a.yaml" in refusal(write(tmp_path, "base: b.yaml\nname: x\n"))
    assert "circle" in refusal(write(tmp_path, "base: self.yaml\n", "self.yaml"))


@pytest.mark.parametrize("base", ["[b.yaml]", "3", "{x: y}", "nowhere.yaml", "''"])
def test_base_that_is_no_file_is_refused(tmp_path, base):
    """A list of bases, or a base that is not there, must be one clear line and not a TypeError."""
    message = refusal(write(tmp_path, f"base: {base}\nname: x\n"))
    assert "base" in message or "nowhere.yaml" in message


@pytest.mark.parametrize(
    "text, key, hint, line",
    [
        ("name: x\ncuont: 3\n", "cuont", "count", 2),
        ("name: x\ninner:\n  rate: 1\n  wrods: []\n", "inner.wrods", "inner.words", 4),
        ("name: x\nmaybe:\n  raet: 1\n", "maybe.raet", "maybe.rate", 3),
        ("name: x\ninnr:\n  rate: 1\n", "innr", "inner", 3),
        ("name: x\n\n\nzzzzzz: 1\n", "zzzzzz", "count", 4),
    ],
)
def test_unknown_key_names_itself_its_line_and_the_nearest(tmp_path, text, key, hint, line):
    """A typo at any level that is ignored, told of the wrong line, or answered by a bare pydantic message."""
    path = write(tmp_path, text)
    message = refusal(path)
    assert f"unknown key {key} " in message and hint in message
    # A misspelled section is placed at the first thing said in it.
    assert f"{path}:{line}" in message


@pytest.mark.parametrize(
    "wrong, choices, hint",
    [
        ("optim.learning_rate", ["optim.lr", "optim.min_lr", "optim.eps"], "; did you mean optim.lr?"),
        ("optim.wd", ["optim.lr", "optim.weight_decay", "optim.w"], "; did you mean optim.weight_decay?"),
        ("optim.zeal", ["optim.lr", "optim.eps"], "; known are optim.eps, optim.lr"),
        ("llama-demo.yml", ["demo.yaml", "llama-demo.yaml", "zero1.json"], "; did you mean llama-demo.yaml?"),
        ("x", ["xylem_y", "count"], "; known are count, xylem_y"),
    ],
)
def test_the_nearest(wrong, choices, hint):
    """A section's name, alike in all keys, that makes any of them look near; an abbreviation that nothing resembles."""
    assert nearest(wrong, choices) == hint


def test_unknown_key_of_a_base_names_the_base(tmp_path):
    """The error must point to the file where the typo stands, not to the one that was asked for."""
    base = write(tmp_path, "name: x\nlowd: true\n", "b.yaml")
    assert f"{base}:2" in refusal(write(tmp_path, "base: b.yaml\n"))


@pytest.mark.parametrize(
    "override, hint",
    [("cuont=4", "count"), ("inner.raet=4", "inner.rate"), ("innr.rate=4", "inner"), ("inner={raet: 4}", "inner.rate")],
)
def test_unknown_key_on_the_command_line(tmp_path, override, hint):
    """A misspelled override that is ignored costs a cluster-week."""
    message = refusal(write(tmp_path, "name: x\n"), override)
    assert f"command line: {override}" in message and hint in message


@given(st.data())
@hypothesis_settings(max_examples=150, deadline=None)
def test_every_misspelling_of_every_key_is_refused(tmp_path_factory, data):
    """Some key that is looked up leniently (an alias, another case, a trailing character) would pass."""
    key = data.draw(st.sampled_from(["name", "count", "loud", "inner.rate", "inner.words", "inner.shares", "maybe.rate"]))
    section, _, last = key.rpartition(".")
    at = data.draw(st.integers(0, len(last) - 1))
    change = data.draw(st.sampled_from(["drop", "double", "swap", "upper"]))
    wrong = {
        "drop": last[:at] + last[at + 1 :],
        "double": last[:at] + last[at] + last[at:],
        "swap": last[:at] + last[at : at + 2][::-1] + last[at + 2 :],
        "upper": last[:at] + last[at].upper() + last[at + 1 :],
    }[change]
    if wrong == last:
        return
    folder = tmp_path_factory.mktemp("typo")
    text = f"name: x\n{section}: {{{wrong}: 1}}\n" if section else f"count: 1\n{wrong}: 1\n"
    for message in (
        refusal(write(folder, text)),
        refusal(write(folder, "name: x\n", "b.yaml"), f"{section}.{wrong}=1" if section else f"{wrong}=1"),
    ):
        assert f"did you mean {key}?" in message


def test_key_said_twice_names_both_lines(tmp_path):
    """YAML's own rule, the last one wins, hides the first from who reads the file."""
    path = write(tmp_path, "name: x\ninner:\n  rate: 1\n  words: []\n  rate: 2\n")
    assert refusal(path) == f"inner.rate is said twice: {path}:3 and {path}:5"
    path = write(tmp_path, "name: x\ninner: {rate: 1}\ninner.rate: 2\n")
    assert "inner.rate is said twice" in refusal(path)


@pytest.mark.parametrize(
    "text, line",
    [
        ("name: x\ninner: [1\n", None),
        ("name: x\n\tcount: 3\n", 2),
        ("name: x\ncount: 'a\n", None),
        ("name: x: y\n", 1),
        ("name: x\ncount: !wrong 3\n", 2),
        ("name: x\ncount: 2020-13-45\n", None),
        ("name: x\ncount: [{[1]: 2}]\n", None),
    ],
)
def test_bad_yaml_names_the_line(tmp_path, text, line):
    """A YAML error, also one that comes up only when a value is built, must not end in a traceback."""
    path = write(tmp_path, text)
    message = refusal(path)
    assert str(path) in message and "not YAML" in message
    if line:
        assert message.startswith(f"{path}:{line}:")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "word\n", "3\n"])
def test_file_that_is_no_mapping(tmp_path, text):
    """A list or a word in place of settings would end in an AttributeError."""
    assert "mapping" in refusal(write(tmp_path, text))


def test_bytes_that_are_no_text(tmp_path):
    """A binary given for a config (a tokenizer, a shard) would end in a UnicodeDecodeError."""
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00name: x")
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    "override, key",
    [
        ("count=many", "count = 'many'"),
        ("count=1.5", "count = 1.5"),
        ("count=", "count = None"),
        ("inner.rate=-1", "inner.rate = -1"),
        ("inner.rate=.nan", "inner.rate = nan"),
        ("inner.rate=.inf", "inner.rate = inf"),
        ("inner.words=3", "inner.words = 3"),
        ("inner=3", "inner = 3"),
        ("inner.shares.x=much", "inner.shares.x = 'much'"),
        ("inner.rate.deeper=1", "inner.rate"),
        ("name=[a]", "name = ['a']"),
    ],
)
def test_wrong_type_names_key_value_and_place(tmp_path, override, key):
    """A value that is coerced to something else, or an error that does not say which key and where."""
    message = refusal(write(tmp_path, "name: x\ninner: {rate: 1.0}\n"), override)
    assert key in message and f"command line: {override}" in message


def test_missing_key_and_missing_file(tmp_path):
    """A required key left out, and a config name with a typo."""
    assert "name is missing" in refusal(write(tmp_path, "count: 3\n"))
    message = refusal(tmp_path / "zero1.jsn")
    assert "no such file" in message and "zero1.jsn" in message
    with pytest.raises(UserError, match=r"did you mean zero1\.json"):
        settings.find("zreo1.json")
    for wrong in ("llama-demo.yml", "llama-demo"):  # an ending of which nothing is shipped, or none
        with pytest.raises(UserError, match=r"did you mean llama-demo\.yaml"):
            settings.find(wrong)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a=1", ("a", 1)), ("a.b=1.0e-3", ("a.b", 1e-3)), ("a=null", ("a", None)), ("a=", ("a", None)), ("a=b=c", ("a", "b=c")),
        ("a=[1, 2]", ("a", [1, 2])), ("a={b: 2}", ("a", {"b": 2})), ("a='1'", ("a", "1")), ("a=true", ("a", True)),
    ],
)  # fmt: skip
def test_override_values_are_yaml(text, expected):
    """A number kept as text, or an '=' in the value cut off."""
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["count", "=3", "--count=3", "", "a=[1"])
def test_word_that_is_no_override(tmp_path, text):
    """A stray word or a flag on the command line must be refused, not taken for a key."""
    assert repr(text) in refusal(write(tmp_path, "name: x\n"), text)


def test_section_can_be_replaced_by_null_and_said_again(tmp_path):
    """`blend: null` in a base, or on the command line, then a share of it: the null must give way."""
    base = "name: x\ninner: {shares: {C4: 0.3, Wiki: 0.7}}\n"
    assert load(write(tmp_path, base), ["inner.shares.C4=0.4"], Outer)[0].inner.shares == {"C4": 0.4, "Wiki": 0.7}
    assert load(write(tmp_path, base), ["inner.shares=null", "inner.shares.C4=1"], Outer)[0].inner.shares == {"C4": 1.0}
    write(tmp_path, "name: x\nmaybe: null\n", "b.yaml")
    assert load(write(tmp_path, "base: b.yaml\nmaybe: {rate: 2}\n"), [], Outer)[0].maybe == Inner(rate=2.0)


def test_settings_do_not_change_after_the_check():
    """A value changed later would escape every check."""
    with pytest.raises(ValueError, match="frozen"):
        Outer(name="x").count = 4


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


def reordered(value: Any) -> Any:
    """The same settings said in the opposite order."""
    if isinstance(value, dict):
        return {key: reordered(inner) for key, inner in reversed(value.items())}
    return [reordered(inner) for inner in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(), NESTED, max_size=4))
def test_digest_knows_values_and_not_order(values):
    """A config hash that depends on the order of keys refuses its own checkpoint; one that misses a value accepts another's."""
    assert re.fullmatch("[0-9a-f]{64}", settings.digest(values))
    assert settings.digest(reordered(values)) == settings.digest(values)
    assert settings.digest({**values, "one more": 1}) != settings.digest(values)
    assert settings.digest({"values": values, "x": 1}) != settings.digest({"values": values, "x": 2})


def test_place_does_not_take_a_neighbour_for_the_key():
    """`run.steps` said in a file does not mean that `run.eval_every` was said there (config.py asks)."""
    tree = Tree()
    tree.set("run.steps", 3, "a.yaml:1")
    assert tree.place("run.eval_every") == "default"
    assert tree.place("run.steps.deeper") == tree.place("run") == "a.yaml:1"
