"""Whatever somebody writes is shown literally: judged by a CommonMark parser with tables."""

from __future__ import annotations

import html
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fedserver.export.markdown import code, escaped, line, paragraphs, table, yaml_text

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
TAG = re.compile(r"<[^>]*>")

HOSTILE = [
    "# heading",
    "- item",
    "+ item",
    "12. item",
    "7) item",
    "===",
    "---",
    "> quote",
    "    code",
    "```\ncode\n```",
    "~~~",
    "a | b |",
    "\\| \\",
    "`tick` ``",
    "*b* __b__ _i_ ~~s~~ $x$",
    "[text](javascript:alert(1)) ![](http://e)",
    "[ref]: http://example.org",
    "<script>alert(1)</script>",
    "<http://example.org>",
    "&lt; &amp;",
    "a\r\n\r\n# b\u2028# c\x00\x1b[31m",
    "line  \nbreak\\\nbreak",
    "\u202eright to left",
    "| --- |",
]
texts = st.one_of(st.text(max_size=40), st.text(alphabet="`*_[]()#|\\<>&~$!-+=.1 \n:a", max_size=20))


def shown(rendered: str) -> str:
    return html.unescape(TAG.sub("", rendered)).strip("\n")


def tags(rendered: str) -> set[str]:
    return set(TAG.findall(rendered))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_paragraph_stays_one_paragraph_of_the_same_text(text: str) -> None:
    check_paragraph(text)


@given(texts)
def test_any_paragraph_stays_one_paragraph_of_the_same_text(text: str) -> None:
    check_paragraph(text)


def check_paragraph(text: str) -> None:
    rendered = PARSER.render(f"before\n\n{escaped(text)}\n\nafter")
    assert tags(rendered) == {"<p>", "</p>"}
    middle = rendered.removeprefix("<p>before</p>\n").removesuffix("<p>after</p>\n")
    assert shown(middle) == line(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_cell_stays_one_cell_of_the_same_text(text: str) -> None:
    check_cell(text)


@given(texts)
def test_any_cell_stays_one_cell_of_the_same_text(text: str) -> None:
    check_cell(text)


def check_cell(text: str) -> None:
    for cell in (escaped(text), code(text)):
        tokens = PARSER.parse("\n".join(table(("a", "b"), [(cell, "end")])))
        cells = [token.content for token in tokens if token.type == "inline"]
        assert len(cells) == 4
        assert cells[3] == "end"
        rendered = PARSER.renderInline(cells[2])
        assert tags(rendered) <= {"<code>", "</code>"}
        assert shown(rendered) in {line(text), text}


@given(texts)
def test_heading_shows_the_same_text(text: str) -> None:
    rendered = PARSER.render(f"# {escaped('x' + text)}")
    assert tags(rendered) == {"<h1>", "</h1>"}
    assert shown(rendered) == line("x" + text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_yaml_is_one_scalar_of_the_same_text(text: str) -> None:
    check_yaml(text)


@given(texts)
def test_any_yaml_is_one_scalar_of_the_same_text(text: str) -> None:
    check_yaml(text)


def check_yaml(text: str) -> None:
    assert yaml.safe_load(f"key: {yaml_text(text)}\nlast: 1") == {"key": line(text), "last": 1}


def test_blank_lines_part_paragraphs() -> None:
    assert paragraphs("one\nline\n \n\n# two\r\n\r\nthree\n\n\x00\n") == ["one line", "\\# two", "three"]


def test_letters_of_scripts_that_need_joiners_survive() -> None:
    assert escaped("می\u200cخواهم 👩\u200d🔬 naïve") == "می\u200cخواهم 👩\u200d🔬 naïve"


def test_ordinary_words_stay_readable() -> None:
    assert escaped("UCI digits (8 x 8), label_skew 0.5 - see notes.") == (
        "UCI digits (8 x 8), label_skew 0.5 - see notes."
    )
