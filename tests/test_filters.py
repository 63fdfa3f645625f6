"""Filters: what each drops, by examples computed by hand and against slow and plain implementations of the same words."""

import string
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspark.data_prep.documents import Document
from megaspark.data_prep.filters import gopher_repetition
from megaspark.data_prep.steps import load_steps


def why(name: str, text: str, **arguments) -> str | None:
    """The reason that a filter has to drop a text, without the filter's name."""
    reason = load_steps([{name: arguments}])[0].reason_to_drop(Document(text, "s"))
    return reason and reason.removeprefix(f"{name}: ")


def rewritten(name: str, text: str, **arguments) -> str:
    result = load_steps([{name: arguments}])[0].apply(Document(text, "s"))
    return "" if isinstance(result, str) else result.text


# ---- length and nfc


def test_length_counts_characters_not_bytes():
    """Bytes for characters would drop three times as much Chinese as English."""
    said = [why("length", text, min_chars=3, max_chars=4) for text in ("日本", "日本語", "日本語文", "日本語の文")]
    assert said == ["too short", None, None, "too long"]


@given(
    st.text(st.sampled_from(["a", "é", "日", ".", "$", "_", "’", " ", "\n", "\u3000"]), max_size=40),
    st.integers(0, 12),
    st.integers(1, 9),
)
@settings(deadline=None)
def test_bare_length_is_slimpajamas(text, limit, repeat):
    """SlimPajama's limit is of characters without punctuation and space; a count that stops early must not stop too early."""
    text, limit = text * repeat * 300, limit * 500
    bare = sum(1 for c in text if not c.isspace() and c not in string.punctuation)
    assert (why("length", text, min_chars=limit, bare=True) == "too short") == (bare < limit)
    assert (why("length", text, max_chars=limit, bare=True) == "too long") == (bare > limit)


MARKS = [c for c in map(chr, range(0x300, 0x370))] + ["\u0f71", "\u0f72", "\u1dce", "\u3099", "\U0001d165"]


@given(
    st.lists(st.text(st.sampled_from([*MARKS, *"aeé한가"]), min_size=1, max_size=9), max_size=9).map("".join),
    st.integers(1, 40),
)
@settings(deadline=None)
def test_nfc_is_unicodes(text, repeat):
    """The short cut for long rows of combining marks must not change what they compose to."""
    for case in (text * repeat, "x" + "".join(sorted(text)) * repeat):
        assert rewritten("nfc", case) == unicodedata.normalize("NFC", case)


# ---- MassiveText


PROSE = "The quick brown fox jumps over the lazy dog and that is what it has to do with all of them here. "


def words(n: int, word: str = "word") -> str:
    return "the of " + " ".join(f"{word}{chr(97 + i // 26 % 26)}{chr(97 + i % 26)}" for i in range(n - 2))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (words(50), None),
        (words(49), "too few words"),
        ("the of " + "a " * 48, "words too short"),  # (3 + 2 + 48) / 50 = 1.06
        ("the of " + "abcdefghijk " * 48, "words too long"),  # 533 / 50 = 10.66
        (words(50) + "#####", None),  # 5 / 50 = 0.1, not above
        (words(50) + "######", "too many hash signs"),
        (words(50) + "..." * 5 + "x", None),
        (words(50) + "..." * 3 + "…" * 3, "too many ellipses"),
        ("\n".join(f"- {words(20)}" for _ in range(10)), "too many bullet lines"),
        ("\n".join(f"- {words(20)}" for _ in range(9)) + f"\n\n  {words(20)}", None),  # 9 of 10 is 90 %, not above
        ("\n".join(f"{words(20)}{'…' if i < 4 else ''}" for i in range(10)), "too many lines end in an ellipsis"),
        ("\n".join(f"{words(20)}{'...' if i < 3 else ''}" for i in range(10)), None),
        (words(40) + " 1234" * 10, None),  # 40 of 50 have a letter: 80 %, enough
        (words(40) + " 12a34" * 10, None),
        (words(40) + " 1234" * 11, "too few words have a letter"),
        (words(50).replace("of", "off"), "too few stop words"),
        ("The OF" + words(50)[6:], None),
        (words(50).replace("of", "the"), "too few stop words"),  # one of them, twice
    ],
)
def test_gopher_quality_by_hand(text, reason):
    """Each limit just kept and just broken: one that is off by one, or turned round, shows nowhere else."""
    assert why("gopher_quality", text) == reason


def test_gopher_quality_upper_limit_of_words():
    """The limit of 100,000 words drops whole books: it must be there by default and go away when told so."""
    assert why("gopher_quality", words(100_000)) is None
    assert why("gopher_quality", words(100_001)) == "too many words"
    assert why("gopher_quality", words(100_001), max_words=None) is None


def slow_ngrams(text: str, n: int) -> tuple[float, float]:
    """Shares of characters in the most frequent n-gram (the longest, the first) and in all that occur twice."""
    tokens = text.split()
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    counts = Counter(grams)
    chars = sum(map(len, tokens))

    def covered(chosen) -> float:
        inside = {i + k for i, gram in enumerate(grams) if gram in chosen for k in range(n)}
        return sum(len(tokens[i]) for i in inside) / chars

    repeated = {gram for gram, count in counts.items() if count > 1}
    if not repeated:
        return 0.0, 0.0
    top = max(repeated, key=lambda gram: (counts[gram], len("".join(gram)), -grams.index(gram)))
    return covered({top}), covered(repeated)


def slow_repetition(text: str, top: dict[int, float], every: dict[int, float]) -> str | None:
    for n in range(2, 11):
        in_top, in_repeated = slow_ngrams(text, n)
        if n in top and in_top > top[n]:
            return f"characters in the top {n}-gram"
        if n in every and in_repeated > every[n]:
            return f"characters in repeated {n}-grams"
    return None


OFF = {"max_lines": 1, "max_paragraphs": 1, "max_line_chars": 1, "max_paragraph_chars": 1}
LIMITS = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.5, 0.9])


@given(
    st.lists(
        st.sampled_from(["a", "bb", "ccc", "日本", "eeeee", "f."]) | st.text("xyz", min_size=1, max_size=3),
        min_size=1,
        max_size=60,
    ),
    st.dictionaries(st.integers(2, 6), LIMITS),
    st.dictionaries(st.integers(2, 10), LIMITS),
)
@settings(max_examples=400, deadline=None)
def test_ngrams_are_those_of_the_plain_implementation(tokens, top, every):
    """Numbered n-grams, covered stretches and the early end are three ways to be wrong by a word."""
    text = " ".join(tokens)
    assert why("gopher_repetition", text, **OFF, top_ngrams=top, repeated_ngrams=every) == slow_repetition(text, top, every)


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "日本"]) | st.text("xyz", min_size=1, max_size=3), min_size=2, max_size=60))
@settings(max_examples=200, deadline=None)
def test_shares_of_characters_are_exact(tokens):
    """A limit of the very share keeps the text and anything below drops it: overlapping n-grams counted twice would show."""
    text = " ".join(tokens)
    for n in range(2, 11):
        for kind, found in zip(("top_ngrams", "repeated_ngrams"), slow_ngrams(text, n), strict=True):
            tables = {"top_ngrams": {}, "repeated_ngrams": {}}
            assert why("gopher_repetition", text, **OFF, **tables | {kind: {n: found}}) is None
            if found:
                assert why("gopher_repetition", text, **OFF, **tables | {kind: {n: found - 1e-9}})


@given(st.lists(st.sampled_from(["one two", "three four five six", "seven", "eight nine ten"]), max_size=80), st.randoms())
@settings(max_examples=100, deadline=None)
def test_default_ngram_limits_are_those_of_table_a1(parts, random):
    """The thresholds themselves, in the order of n."""
    text = " ".join(part if random.random() < 0.7 else f"{part}{i}" for i, part in enumerate(parts)) or "x"
    top = {2: 0.20, 3: 0.18, 4: 0.16}
    every = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    assert top == gopher_repetition.TOP_NGRAMS and every == gopher_repetition.REPEATED_NGRAMS
    assert why("gopher_repetition", text, **OFF) == slow_repetition(text, top, every)


NONE = {"top_ngrams": {}, "repeated_ngrams": {}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n".join("abcdefghij"), None),
        ("\n".join([*"abcdef", "g" * 9, *"aaa"]), None),  # 3 copies in 10 lines: 0.30, not above
        ("\n".join("abcdefaaaa"), "repeated lines"),
        ("\n\n".join([*"abcdef", "g" * 9, *"aaa"]), None),
        ("\n \n".join(["a\nb", "a\nb", "a\nb", "c\nd", "e\nf"]), "repeated lines"),  # 4 of 10 lines
        ("\n\n".join(["a", "b", "a", "a", "x\n" + "\n".join("cdefghijk")]), "repeated paragraphs"),  # 2 of 5; 2 of 14 lines
        ("aaaa\nbb\nc\nd\naaaa\nefgh\ni\nj", "characters in repeated lines"),  # 4 of 18 characters, 1 of 8 lines
        ("aaa\nbb\nc\nd\naaa\nefgh\nij\nj", None),  # 3 of 17 = 0.18
    ],
)
def test_gopher_repeated_lines_by_hand(text, reason):
    """Copies of lines and paragraphs: their number and their characters have limits of their own."""
    assert why("gopher_repetition", text, **NONE) == reason


def test_gopher_repeated_paragraph_characters_by_hand():
    """With its other limits as they are, this one can be met by long paragraphs that share no whole share of lines."""
    text = "\n\n".join(["a" * 40, *"bcdefghij", "a" * 40])
    assert why("gopher_repetition", text, max_line_chars=1, **NONE) == "characters in repeated paragraphs"
    assert why("gopher_repetition", text, max_line_chars=1, max_paragraph_chars=0.46, **NONE) is None  # 40 of 89


def test_prose_is_kept_and_boilerplate_dropped():
    """The defaults as a whole: ordinary text passes, a page that says one thing over and over does not."""
    prose = PROSE + words(80)
    assert [why(name, prose) for name in ("gopher_quality", "gopher_repetition")] == [None, None]
    assert why("gopher_repetition", f"{words(60)} " * 3) == "characters in repeated 5-grams"
    assert why("gopher_repetition", "buy now " * 50) == "characters in the top 2-gram"


# ---- FineWeb and C4


def lines(*counts: tuple[int, str]) -> str:
    return "\n".join(f"{i:03d} {text}" for count, text in counts for i in range(count))


LONG = "a line of well over thirty characters"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (lines((13, LONG + "."), (87, LONG)), None),
        (lines((12, LONG + "."), (88, LONG)), "too few lines end in punctuation"),  # 0.12 is dropped
        (lines((33, LONG + "。"), (67, "short!")), "too many short lines"),  # 0.67 is dropped
        (lines((34, LONG + "?”"), (66, "short!")), None),
        ("x" * 29 + ".", None),  # 30 is not short
        ("x" * 28 + ".", "too many short lines"),
        (
            "\n".join([*[f"{i}" + "x" * 38 + "." for i in range(9)], "0" + "x" * 38 + "."]),
            "characters in repeated lines",
        ),  # 0.1
        ("\n".join([*[f"{i:02d}" + "x" * 37 + "." for i in range(10)], "00" + "x" * 37 + "."]), None),  # 1 of 11
    ],
)
def test_fineweb_by_hand(text, reason):
    """FineWeb's limits belong to what is dropped, unlike Gopher's."""
    assert why("fineweb", text) == reason


def test_fineweb_limits_can_be_taken_away():
    """A limit of 0 still drops texts without any punctuation: null is the only way to be rid of it."""
    text = "menu\nmenu\nhome"
    assert why("fineweb", text, min_punctuated_lines=0) == "too few lines end in punctuation"
    assert why("fineweb", text, min_punctuated_lines=None) == "characters in repeated lines"
    assert why("fineweb", text, min_punctuated_lines=None, max_repeated_line_chars=None) == "too many short lines"
    assert why("fineweb", text, min_punctuated_lines=None, max_repeated_line_chars=None, max_short_lines=None) is None


def test_c4_lines_by_hand():
    """Which lines stay, and that what stays is untouched but for citation marks and the space around a line."""
    kept = ["This line has five words.", 'She said "that is quite enough"', "Is 3 < 4 and 5?", "  An indented line is kept!  "]
    gone = [
        "Too few words.",
        "No mark at the end of it",
        "Please enable JavaScript to see this.",
        "We have a Privacy Policy for you.",
    ]
    page = "\n".join([*kept, *gone, "", "The citation[12] goes[citation needed] and a[i] stays.[edit]"])
    expected = [line.strip() for line in kept] + ["The citation goes and a[i] stays."]
    assert rewritten("c4_lines", page) == "\n".join(expected)
    assert rewritten("c4_lines", "Too few words.", min_words=3) == "Too few words."
    assert rewritten("c4_lines", "日本語の文です。", min_words=1, terminal=["。"]) == "日本語の文です。"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("One. Two! Three?", None),
        ("One. Two! Three", "too few sentences"),
        ("One... Two?! (Three.)", None),
        ("v1.2.3 is no sentence. e.g. this", "too few sentences"),
        ('"One." "Two." Three.', None),
        ("一。二！三？", None),
        ("One. Two. Three. Lorem Ipsum dolor.", "lorem ipsum"),
        ("One. Two. if (x) { y. }", "curly bracket"),
        ("." * 1000, "too few sentences"),
    ],
)
def test_c4_pages_by_hand(text, reason):
    """Dots inside of numbers and rows of dots are no sentences; a bracket after the dot still ends one."""
    assert why("c4_pages", text) == reason
