"""Extracts text from the formats of documentation packages: gzip, HTML, dictd dictionaries, SWORD modules.

dictd (RFC 2229's server): a .dict.dz is gzip. Its .index has lines `headword TAB offset TAB length`, both numbers in
base 64 with dictd's own alphabet. SWORD compressed modules: an index (.bzs, .czs) of 12-byte entries (offset, packed
size, size). Each entry points to a zlib block in the .bzz or .czz beside it. A block is a book or a chapter of OSIS
XML.
"""

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from lxml import etree, html  # pyright: ignore[reportAttributeAccessIssue]  lxml has no type stubs of its own

# Two characters of Unicode's private use area mark the end of a block and a <pre> while spaces are joined.
BLOCK_END, PRE_MARK = "\ue000", "\ue001"

BLOCKS = (
    "p", "div", "br", "h1", "h2", "h3", "h4", "h5", "h6", "li", "ul", "ol", "tr", "table", "dt", "dd", "dl", "title", "chapter",
    "section", "article", "main", "blockquote", "hr", "lg", "l", "pre",
)  # fmt: skip
DROPPED = ("script", "style", "head", "nav", "footer", "svg", "form", "button", "select", "template", "noscript")
NAVIGATION = etree.XPath(
    "//div[contains(@class,'navheader') or contains(@class,'navfooter') or contains(@class,'sphinxsidebar') "
    "or contains(@class,'related') or @class='toc' or contains(@class,'tocset') or contains(@class,'navset') or @id='leftnav'] | //a[@class='headerlink']"
)
MAIN = etree.XPath("(//main | //div[@role='main'])[1]")

SPACES = re.compile(r"[ \t\r\n]+")
EMPTY_LINES = re.compile(r"\n\s*\n\s*")

OSIS_TITLE = re.compile(r"<(/?)title\b")  # in OSIS a chapter's heading; an HTML page has one title, outside its text

DICT_DIGITS = {c: n for n, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def plain_text(path: Path) -> str:
    """Returns the content of a text file, decompressed if it is gzip."""
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", errors="replace")


def html_text(markup: str) -> str:
    """Returns the text of an HTML or XML page: one line per block, <pre> unchanged, no navigation.

    If a page marks its main content, only that is taken.
    """
    parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True)
    try:
        root = html.document_fromstring(markup.encode(), parser=parser)
    except etree.ParserError:  # a page without a single element
        return "\n"
    etree.strip_elements(root, *DROPPED, with_tail=False)
    for node in NAVIGATION(root):
        node.drop_tree()
    main = MAIN(root)
    root = main[0] if main else root
    kept = [_take_pre(node) for node in list(root.iter("pre"))]
    for node in root.iter(*BLOCKS):
        node.text = BLOCK_END + (node.text or "")
        node.tail = BLOCK_END + (node.tail or "")
    text = SPACES.sub(" ", etree.tostring(root, method="text", encoding="unicode")).replace(BLOCK_END, "\n\n")
    pieces = iter(kept)
    text = re.sub(PRE_MARK, lambda _: f"\n{next(pieces)}\n", text)
    return EMPTY_LINES.sub("\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip() + "\n"


def _take_pre(node: html.HtmlElement) -> str:
    """Returns the text of a <pre> and leaves PRE_MARK in its place."""
    text = "".join(node.itertext())
    for child in list(node):
        node.remove(child)
    node.text = PRE_MARK
    return text


def dictionary_pages(index: Path, entries_per_page: int) -> Iterator[str]:
    """Yields the entries of a dictd dictionary in file order, several per page."""
    with gzip.open(index.with_suffix(".dict.dz")) as file:
        content = file.read()
    spans = set()
    for line in index.read_text(encoding="utf-8").splitlines():
        headword, offset, length = line.split("\t")[:3]
        if not headword.startswith("00"):  # entries that describe the dictionary itself
            spans.add((_dict_number(offset), _dict_number(length)))
    entries = [
        content[start : start + length].decode("utf-8", errors="replace").strip() for start, length in sorted(spans)
    ]
    for start in range(0, len(entries), entries_per_page):
        yield "\n\n".join(entries[start : start + entries_per_page]) + "\n"


def _dict_number(text: str) -> int:
    number = 0
    for character in text:
        number = 64 * number + DICT_DIGITS[character]
    return number


def sword_blocks(index: Path) -> Iterator[str]:
    """Yields the text of each block of a SWORD module, from its .bzs or .czs file."""
    packed = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
        if size:
            block = zlib.decompress(packed[offset : offset + size]).decode("utf-8", errors="replace")
            yield html_text(OSIS_TITLE.sub(r"<\1h1", block))
