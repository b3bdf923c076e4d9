"""enwik8: markup to text case by case, broken markup, the dump's reader, and the tool, on a dump made here."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import tarfile
from html import escape
from pathlib import Path
from types import ModuleType

import pytest

from megalowrank.data.archive import Archive
from megalowrank.data.enwik8 import enwik8_articles
from megalowrank.data.manifest import load_manifest
from megalowrank.data.wikitext import plain_text
from megalowrank.errors import ConfigError
from tests.corpus import documents
from tests.harness import ROOT


@pytest.mark.parametrize(
    "markup, text",
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("a [[link]] and [[target|label]] and [[a (b)|]]", "a link and label and a (b)"),
        ("[[Image:x.png|thumb|A [[cat]] here]]seen[[de:Katze]][[Category:Cats]]", "seen"),
        ("[[zh-min-nan:x]]a [[:Category:Cats|cats]] b", "a cats b"),
        ("x {{infobox | a = {{nested|b}} | c }} y", "x y"),
        ("before\n{| class=a\n| cell {{t}} {|\n| inner\n|}\n|}\nafter", "before\n\nafter"),
        ("see [http://a.b/c the site] or http://d.e/f or [http://g.h]", "see the site or or"),
        ("one<!-- hidden -->two<ref name=x>cite</ref>three<ref/> <b>four</b>", "onetwothree four"),
        ("== Head ==\n* one\n** two\n# three\n:indented\n----\nend", "Head\n\none\ntwo\nthree\nindented\nend"),
        ("a\n== See also ==\n* b\n=== sub ===\nc\n== Real ==\nd", "a\n\nReal\n\nd"),
        ("a\n==External links==\n* b", "a"),
        ("&amp;nbsp;x&ndash;y &lt;i&gt; 5&nbsp;km", "x–y <i> 5 km"),
        ("open {{ never closed [[and a link", "open never closed and a link"),
        ("closed }} but not open ]] |}", "closed but not open"),
        ("[[a {{b]] c", "a b c"),
        ("__TOC__x<math>a_b</math>y", "xy"),
        ("", ""),
    ],
)
def test_markup(markup: str, text: str) -> None:
    assert plain_text(markup) == text + "\n"


def page(number: int, title: str, text: str) -> str:
    fields = f"<title>{escape(title)}</title>\n<id>{number}</id>\n<revision><id>9{number}</id><timestamp>t</timestamp>"
    return f"<page>{fields}<contributor><id>7</id></contributor><text>{escape(text)}</text></revision></page>\n"


@pytest.fixture
def dump(tmp_path: Path) -> tuple[Archive, str, Path]:
    """An archive like the real one in a cache folder, and the hash of its text."""
    pages = [page(n, f"Title {n}", f"'''{text}''' [[link]]") for n, text in enumerate(documents(30, 20), 10)]
    pages += [page(1, "Talk:x", "t" * 300), page(2, "Template talk:x", "t" * 300), page(3, "Old", "#REDIRECT [[x]]")]
    pages += [page(4, "Short", "short"), page(5, "AT&amp;T: a firm", "company " * 50)]
    raw = f'<mediawiki xmlns="http://x.y/z">\n{"".join(pages)}{page(6, "Cut", "x" * 300)[:200]}'.encode()
    content, cache = gzip.compress(raw), tmp_path / "cache"
    cache.mkdir()
    with tarfile.open(cache / "wiki_text-1.0.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo("wiki-1.0/data/x.gz")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    digest = hashlib.sha256((cache / "wiki_text-1.0.tar.gz").read_bytes()).hexdigest()
    return Archive("wiki-text", "1.0", digest, r"wiki-1\.0/data/x\.gz"), hashlib.sha256(raw).hexdigest(), cache


def test_articles_of_a_dump_that_ends_anywhere(dump: tuple[Archive, str, Path]) -> None:
    archive, digest, cache = dump
    articles = enwik8_articles(cache, archive, digest)
    by_id = {article.id: article for article in articles}
    assert sorted(by_id) == [5, *range(10, 40)] and by_id[5].title == "AT&T: a firm"
    assert by_id[12].text == documents(30, 20)[2] + "link\n"
    order = [article.id for article in articles]
    assert order != sorted(order) and order == [article.id for article in enwik8_articles(cache, archive, digest)]
    with pytest.raises(ConfigError, match="does not hold enwik8"):
        enwik8_articles(cache, archive, "0" * 64)


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_enwik8", ROOT / "tools" / "prepare_enwik8.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool(
    dump: tuple[Archive, str, Path],
    tmp_path: Path,
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive, digest, cache = dump
    monkeypatch.setattr(tool, "enwik8_articles", lambda folder: enwik8_articles(folder, archive, digest))
    tool.prepare_enwik8(tmp_path / "out", cache, 320, None, 1)
    prefix = tmp_path / "out" / "enwik8"
    assert f"use with: --data-path {prefix} --tokenizer-model {prefix}.model" in capsys.readouterr().out
    lines = [json.loads(line) for line in prefix.with_suffix(".jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["id", "title", "text"]] * 31
    manifest = load_manifest(prefix) or {}
    assert (manifest["documents"], manifest["vocab_size"]) == (31, 320)
    tool.prepare_enwik8(tmp_path / "out", cache, 330, None, 1)
    tool.prepare_enwik8(tmp_path / "out", cache, 0, f"{prefix}.model", 1)
    assert (load_manifest(prefix) or {})["vocab_size"] == 330
