"""Generated texts that hold what breaks alignments: accents, emoji, CJK, combining marks, odd spaces, line breaks."""

from __future__ import annotations

from hypothesis import strategies as st

PARTS = [
    "best", "running", "shoes", "café", "cafe\u0301", "naïve", "北京", "天", "烤鸭", "東京・ビール",
    "🙂", "👩\u200d👩\u200d👧", "👍🏽", "🇫🇷", "\u0301", "\u200d", "\ufeff", "\ufffd",
    "wi-fi", "don't", "...", "!", ",", "“q”", "Ελληνικά", "поиск", "עברית", "हिन्दी", "ﬁ", "Ａ", "½",
    "unseenword", "addedword", "<0x41>", "▁", "##ing",
]  # fmt: skip
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u3000", ""]


def texts(alphabet: str | None = None) -> st.SearchStrategy[str]:
    """Texts of up to a dozen parts, or of characters of `alphabet` alone."""
    if alphabet is not None:
        return st.text(alphabet, max_size=20)
    part = st.one_of(st.sampled_from(PARTS), st.sampled_from(SPACES), st.text(max_size=3))
    return st.lists(part, max_size=12).map("".join)
