"""Wiki markup to plain text: templates, tables, images and link lists go, labels of links and prose stay."""

from __future__ import annotations

import html
import re

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_DROPPED_ELEMENT = re.compile(
    r"<(ref|math|gallery|timeline|table|pre|code|hiero|imagemap|references)\b[^<>]*(?:/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_LINE_BREAK = re.compile(r"<(?:br|/?p|/?div|hr)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_BRACKET = re.compile(r"\{\{|\}\}|\{\||\|\}(?!\})|\[\[|\]\]")
_OPENER = {"}}": "{{", "|}": "{|", "]]": "[["}
_NAMESPACE = re.compile(
    r"\s*(?:image|file|category|media|template|[a-z]{2,3}|[a-z]{2,3}-[a-z-]{2,12}|simple)\s*:", re.I
)
_WEB_LINK = re.compile(r"\[(?:https?|ftp|mailto|news|irc):[^\s\]]*\s*([^\]\n]*)\]", re.IGNORECASE)
_BARE_LINK = re.compile(r"(?:https?|ftp)://[^\s<>\]]+", re.IGNORECASE)
_EMPHASIS = re.compile(r"'{2,5}")
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_HEADING = re.compile(r"(={1,6})\s*(.*?)\s*=+\s*")
_LINK_SECTION = re.compile(
    r"(?:see also|(?:external|related) (?:links?|articles|topics)|references?|notes|bibliography|further reading"
    r"|sources?|footnotes|literature)(?: and .*)?",
    re.IGNORECASE,
)
_LIST_MARK = re.compile(r"[*#:;]+\s*")
_TABLE_LINE = re.compile(r"[|!]|-{4}")
_BLANKS = re.compile(r"[ \t\u00a0]+")


def plain_text(markup: str) -> str:
    """The prose of a page: paragraphs between blank lines, headings and list items on lines of their own.

    Markup may be broken: brackets without partner are dropped and what they held stays.
    """
    text = _COMMENT.sub("", markup)
    text = _DROPPED_ELEMENT.sub("", text)
    text = _TAG.sub("", _LINE_BREAK.sub("\n", text))
    text = _resolve_brackets(text)
    text = _BARE_LINK.sub("", _WEB_LINK.sub(r"\1", text))
    text = _MAGIC_WORD.sub("", _EMPHASIS.sub("", text))
    return _tidy_lines(html.unescape(html.unescape(text)))


def _resolve_brackets(text: str) -> str:
    """Replace every bracketed span, the innermost first, by what a reader sees of it."""
    stack: list[tuple[str, list[str]]] = [("", [])]
    position = 0
    for match in _BRACKET.finditer(text):
        stack[-1][1].append(text[position : match.start()])
        position = match.end()
        opener = _OPENER.get(match.group())
        if opener is None:
            stack.append((match.group(), []))
        elif any(opener == other for other, _ in stack):
            _close(stack, opener)
    stack[-1][1].append(text[position:])
    return "".join(piece for _, pieces in stack for piece in pieces)


def _close(stack: list[tuple[str, list[str]]], opener: str) -> None:
    """End the innermost span that ``opener`` began; spans left open inside become plain text."""
    inner: list[str] = []
    while True:
        found, pieces = stack.pop()
        inner = pieces + inner
        if found == opener:
            break
    if opener == "[[":
        stack[-1][1].append(_label("".join(inner)))


def _label(link: str) -> str:
    target, bar, label = link.rpartition("|")
    if _NAMESPACE.match(link):
        return ""
    return label if bar and label else target or link.lstrip(":")


def _tidy_lines(text: str) -> str:
    lines: list[str] = []
    skipped_level = 0
    for raw in text.split("\n"):
        line = _BLANKS.sub(" ", raw).strip()
        heading = _HEADING.fullmatch(line)
        if heading:
            level = len(heading[1])
            if not skipped_level or level <= skipped_level:
                skipped_level = level if _LINK_SECTION.fullmatch(heading[2]) else 0
            line = f"\n{heading[2]}\n"
        elif _TABLE_LINE.match(line):
            continue
        if not skipped_level:
            lines.append(_LIST_MARK.sub("", line, count=1) if _LIST_MARK.match(line) else line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
