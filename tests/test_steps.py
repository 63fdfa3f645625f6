"""Steps: what a job names is what runs, in that order, and a mistake is refused before anything starts."""

import importlib
import inspect
import time
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspark.data_prep.documents import Document
from megaspark.data_prep.steps import KINDS, apply_steps, load_steps, step_names
from megaspark.errors import UserError


def after(text: str, *specs) -> str:
    """What the steps make of a text, or why they drop it in <>."""
    result = apply_steps(Document(text, "s"), load_steps(specs))
    return f"<{result}>" if isinstance(result, str) else result.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenght", r"no filter 'lenght' in data_prep/filters; did you mean length\?"),
        ("_shared", "no filter '_shared'"),
        ("documents", "no filter 'documents'.*known are c4_lines"),
        ({"length": {"min_char": 1}}, r"unknown argument steps.length.min_char; did you mean steps.length.min_chars\?"),
        ({"length": {"doc": "x"}}, "unknown argument steps.length.doc"),
        ({"nfc": {"form": "NFC"}}, "unknown argument steps.nfc.form; it takes none"),
        ({"length": {"min_chars": "many"}}, r"steps.length.min_chars = 'many': .*valid integer"),
        ({"length": {"min_chars": -1}}, r"steps.length.min_chars = -1: .*greater than or equal to 0"),
        (
            {"gopher_quality": {"max_bullet_lines": 90}},
            r"steps.gopher_quality.max_bullet_lines = 90: .*less than or equal to 1",
        ),
        ({"gopher_repetition": {"top_ngrams": {1: 0.2}}}, r"steps.gopher_repetition.top_ngrams"),
        ({"length": {}, "nfc": {}}, "each is one filter"),
    ],
)
def test_a_mistake_is_refused_and_the_nearest_name_given(spec, message):
    """Of a misspelled threshold one would learn from the finished corpus, if ever; a share in percent keeps everything."""
    with pytest.raises(UserError, match=message):
        load_steps([spec])


def test_arguments_reach_the_filter():
    """A threshold that is accepted and not used would go unnoticed."""
    assert after("abc", {"length": {"min_chars": 4}}) == "<length: too short>"
    assert after("abc", {"length": None}) == "abc"
    assert after("• a\n• b\nc", {"gopher_quality": {"bullets": ["•"], "min_words": 1, "max_bullet_lines": 0.5}}).startswith("<")


def test_steps_run_in_order_and_each_sees_what_the_one_before_left():
    """A filter that judged the text as it was before its rewriting would drop and count the wrong documents."""
    page = "e\u0301 is a letter of five words.\nmenu"
    assert after(page, "nfc") == "é is a letter of five words.\nmenu"
    assert after(page, "c4_lines", "nfc") == "é is a letter of five words."
    assert after(page, "c4_lines", {"length": {"min_chars": 30}}) == "<length: too short>"
    assert after(page, {"length": {"min_chars": 30}}, "c4_lines") == "e\u0301 is a letter of five words."
    assert after("e\u0301", {"length": {"min_chars": 2}}, "nfc") == "é"
    assert after("e\u0301", "nfc", {"length": {"min_chars": 2}}) == "<length: too short>"


def test_a_text_without_anything_is_dropped_by_name():
    """An empty document must be counted where it became empty, and reach no later step."""
    assert after("") == after("", "c4_lines") == "<empty>"
    assert after("menu", "c4_lines", {"length": {"min_chars": 9}}) == "<c4_lines: nothing left>"


@pytest.mark.parametrize("name", step_names())
def test_every_filter_keeps_to_the_convention(name):
    """A file with both functions, an argument without type, or with a default that it forbids, fails in mid-job."""
    module = importlib.import_module(f"megaspark.data_prep.filters.{name}")
    (kind,) = [kind for kind in KINDS if hasattr(module, kind)]
    function = getattr(module, kind)
    types = typing.get_type_hints(function)
    assert types.pop("return") == (Document if kind == "rewrite" else str | None)
    doc, *parameters = inspect.signature(function).parameters.values()
    assert types[doc.name] is Document and all(p.name in types for p in parameters)
    assert module.__doc__ and function.__doc__
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    if len(given) == len(parameters):
        (step,) = load_steps([{name: given}])
        assert step.arguments == given


PARTS = [
    "the ",
    "a",
    ".",
    "...",
    "\n",
    "\n\n",
    " ",
    "#",
    "- ",
    "e\u0301",
    "\u0301\u0323",
    "[1]",
    '."',
    "{",
    "日本。",
    "\r\n",
    "\u2028",
    "\x00",
]
FREE = [name for name in step_names() if name != "drop_duplicates"]  # it needs a folder


@given(st.lists(st.sampled_from(PARTS), max_size=60).map("".join), st.sampled_from(FREE))
@settings(max_examples=400, deadline=None)
def test_no_text_breaks_a_filter(text, name):
    """One odd document among billions would end the job; asked again, a filter says the same and rewrites no more."""
    once = after(text, name)
    assert after(text, name) == once
    if text and not once.startswith("<"):
        assert after(once, name) == once


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize(
    "piece",
    [
        "a",
        ".",
        " ",
        "\n",
        "a ",
        "ab\n",
        "\u0301\u0323",
        "[",
        "[1",
        ". ",
        '."',
        "[1] ",
        "\n \n",
        "e\u0301",
        "…",
        "a. b! c? ",
        "x" * 40 + " ",
    ],
)
def test_time_grows_no_faster_than_the_text(name, piece):
    """A pattern that walks back over rows of dots, or marks sorted one by one, holds a job for hours at one line of 5 MB."""
    (step,) = load_steps([name])

    def seconds(chars: int) -> float:
        doc = Document((piece * (chars // len(piece) + 1))[:chars] + "x", "s")
        best = float("inf")
        for _ in range(2):
            start = time.process_time()
            step.apply(doc)
            best = min(best, time.process_time() - start)
        return best

    step.apply(Document("é\u0301" * 99, "s"))  # tables are made at first use
    small = seconds(20_000)
    assert seconds(160_000) < 30 * small + 0.05  # 8 times the text; quadratic is 64 times
