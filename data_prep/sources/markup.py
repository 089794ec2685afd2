"""Text out of the formats in which documentation is packaged: gzip, HTML, dictd dictionaries, SWORD modules.

HTML is stripped by patterns, not parsed: the pages are made by generators, and a parser in Python would take ten times as long.
dictd (RFC 2229's server): a .dict.dz is gzip, its .index has lines `headword TAB offset TAB length`, both numbers in base 64 of
their own alphabet. SWORD compressed modules: an index (.bzs, .czs) of 12-byte entries (offset, packed size, size), each pointing
at a zlib block in the .bzz or .czz beside it; a block is a book or a chapter of OSIS XML.
"""

import gzip
import html
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

DROPPED = re.compile(
    r"<!--.*?-->|<(script|style|head|nav|footer|svg)\b.*?</\1>"
    r'|<div[^>]*class="(?:navheader|navfooter|toc|sphinxsidebar|related)[^>]*>.*?(?=<hr|<h[1-6]|<p\b|</body|<div[^>]*class="titlepage)',
    re.DOTALL | re.IGNORECASE,
)
PREFORMATTED = re.compile(r"(<pre\b.*?</pre>)", re.DOTALL | re.IGNORECASE)
LINE_ENDS = re.compile(
    r"</?(?:p|div|br|h[1-6]|li|ul|ol|tr|table|dt|dd|dl|title|chapter|section|blockquote|hr|lg|l)\b[^>]*>", re.IGNORECASE
)
TAG = re.compile(r"<[^>]+>")
SPACES = re.compile(r"[ \t\r\n]+")
EMPTY_LINES = re.compile(r"\n\s*\n\s*")

DICT_DIGITS = {c: n for n, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def plain_text(path: Path) -> str:
    """Returns the content of a text file, unpacked if it is gzip."""
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", errors="replace")


def html_text(markup: str) -> str:
    """Returns the text of an HTML or XML page: a line a block, <pre> kept as it is, navigation left out."""
    parts = PREFORMATTED.split(DROPPED.sub("", markup))
    for number, part in enumerate(parts):
        if number % 2 == 0:
            part = LINE_ENDS.sub("\0", part)
            part = SPACES.sub(" ", TAG.sub("", part)).replace("\0", "\n\n")
        else:
            part = "\n" + TAG.sub("", part) + "\n"
        parts[number] = html.unescape(part)
    lines = (line.rstrip() for line in "".join(parts).splitlines())
    return EMPTY_LINES.sub("\n\n", "\n".join(lines)).strip() + "\n"


def dictionary_pages(index: Path, entries_per_page: int) -> Iterator[str]:
    """Yields the entries of a dictd dictionary in the order of its file, several to a page."""
    with gzip.open(index.with_suffix(".dict.dz")) as file:
        content = file.read()
    spans = set()
    for line in index.read_text(encoding="utf-8").splitlines():
        headword, offset, length = line.split("\t")[:3]
        if not headword.startswith("00"):  # the dictionary's description of itself
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
    """Yields the text of each block of a SWORD module, given its .bzs or .czs file."""
    packed = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
        if size:
            yield html_text(zlib.decompress(packed[offset : offset + size]).decode("utf-8", errors="replace"))
