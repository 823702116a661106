"""A page as a browser sees it: its elements, its text, and what it would fetch."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = {"meta", "img", "br", "link", "input", "hr", "source"}
_FETCHING = {"src", "href", "srcset", "poster", "data", "action", "background", "xlink:href"}


class Page(HTMLParser):
    """Parses `text`; fails on an end tag that closes no open element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.fetched: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    @property
    def text(self) -> str:
        """What is written on it, styles left out, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.fetched += [value or "" for name, value in attrs if name in _FETCHING]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)


def assert_harmless(text: str) -> Page:
    """`text` holds no script, no event handler, nothing to fetch from anywhere, and no invisible character."""
    page = Page(text)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "base", "form", "svg", "math"}
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(value.startswith("data:image/") for value in page.fetched), page.fetched
    assert "url(" not in text and "@import" not in text
    assert not set(text) & set("\u202e\u202d\u2066\x00\x1b\ud800")
    return page
