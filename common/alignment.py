"""Words <-> characters <-> tokens, on the very ids in hand, for any tokenizer.

An annotator scores words, the reward model reads its own tokens, the actor acts in others. The meeting ground is
the response's text: `TokenDecoder` turns generated ids into that text and tells which characters each id holds,
without ever encoding again (decode followed by encode may give other ids, and then rewards land on tokens that the
actor never chose). Words carry scores across: `pool_token_scores` from one tokenizer's tokens to words,
`copy_word_scores` or `split_word_scores` from words to the other's.

A span is half-open and in characters. A token that holds one of the three bytes of a character spans a third of it,
so that nothing is counted twice; see docs/method.md, section 2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common.errors import InputError
from common.text import Word

IGNORE_LABEL = -100
NO_LINE = -1

Span = tuple[float, float]

# Decoders that say how a token is spelled; exactly one kind of them makes a tokenizer that can be followed.
_BASE_DECODERS = ("ByteLevel", "Replace", "Metaspace", "WordPiece")
_SPAN_ROUNDING = 1e-6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# The WordPiece decoder's `cleanup` takes away the space before these.
_GLUED_BY_CLEANUP = (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")


class DecodedTokens(NamedTuple):
    """The text of a sequence of ids and each id's span in it; special tokens have an empty span."""

    text: str
    spans: list[Span]


class TokenDecoder:
    """Turns ids into text and character spans for byte-level BPE, SentencePiece (BPE with byte fallback, Unigram)
    and WordPiece tokenizers of the `tokenizers` library.

    The text equals `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`, except that
    every byte that belongs to no valid UTF-8 character becomes one U+FFFD. Raises `InputError` for a tokenizer whose
    ids cannot be traced to characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(
                f"{type(tokenizer).__name__} has no fast version (tokenizers library), so its tokens have no character "
                "offsets; choose a model with a fast tokenizer, or convert it with convert_slow_tokenizer"
            )
        steps = _decoder_steps(json.loads(backend.to_str())["decoder"])
        _check_decoder(type(tokenizer).__name__, steps)
        kinds = {step["type"]: step for step in steps}
        self._tokenizer = tokenizer
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._word_piece: dict[str, Any] | None = kinds.get("WordPiece")
        self._metaspace: dict[str, Any] | None = kinds.get("Metaspace")
        self._replacements = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
        self._strips_first_space = "Strip" in kinds
        self._special = set(tokenizer.all_special_ids) | {
            id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._byte_of_char = {char: byte for byte, char in bytes_to_unicode().items()}
        self._pieces: dict[tuple[int, bool], bytes | None] = {}

    def __call__(self, ids: Sequence[int]) -> DecodedTokens:
        """Text and spans of `ids`, one span an id."""
        pieces: list[bytes] = []
        first = True
        for id_ in ids:
            piece = self._piece(int(id_), first)
            first = first and piece is None
            pieces.append(piece or b"")
        if self._strips_first_space:
            _strip_first_space(pieces)
        text, position_of_byte = _decode_bytes(b"".join(pieces))
        spans: list[Span] = []
        offset = 0
        for piece in pieces:
            spans.append((position_of_byte[offset], position_of_byte[offset + len(piece)]))
            offset += len(piece)
        return DecodedTokens(text, spans)

    def _piece(self, id_: int, first: bool) -> bytes | None:
        """The bytes that an id adds to the text, at its start or later; None for an id that decoding leaves out.

        Left out are special tokens and ids of a padded embedding matrix that no token stands for.
        """
        key = (id_, first)
        if key not in self._pieces:
            token = None if id_ in self._special else self._tokenizer.convert_ids_to_tokens(id_)
            self._pieces[key] = None if token is None else self._bytes_of(token, first)
        return self._pieces[key]

    def _bytes_of(self, token: str, first: bool) -> bytes:
        if self._byte_level:
            if all(char in self._byte_of_char for char in token):
                return bytes(self._byte_of_char[char] for char in token)
            return token.encode()  # an added token is plain text
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if self._word_piece is not None:
            return self._word_piece_text(token, first).encode()
        if self._metaspace is not None:
            drops_space = first and self._metaspace.get("prepend_scheme", "always") != "never"
            return token.replace(self._metaspace["replacement"], "" if drops_space else " ").encode()
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()

    def _word_piece_text(self, token: str, first: bool) -> str:
        if first:
            return token
        prefix = self._word_piece["prefix"]
        if token.startswith(prefix):
            return token.removeprefix(prefix)
        glued = self._word_piece["cleanup"] and token.startswith(_GLUED_BY_CLEANUP)
        return token if glued else f" {token}"


def token_words(words: Sequence[Word], spans: Sequence[Span]) -> list[int]:
    """For each token the index of the word that it overlaps most (the first of equals), -1 for none."""
    best = [0.0] * len(spans)
    owner = [-1] * len(spans)
    for word, token, overlap in _overlaps(words, spans):
        # Thirds of a character are rounded, so equals are equal only up to rounding.
        if overlap > best[token] + _SPAN_ROUNDING:
            best[token], owner[token] = overlap, word
    return owner


def token_labels(words: Sequence[Word], labels: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """Each token carries its word's label, `IGNORE_LABEL` without a word; docs/method.md, section 2."""
    _check_lengths(words, labels)
    return [labels[word] if word >= 0 else IGNORE_LABEL for word in token_words(words, spans)]


def copy_word_scores(words: Sequence[Word], scores: Sequence[float], spans: Sequence[Span]) -> list[float]:
    """Each token gets the whole score of the word that it overlaps most (the paper's reading), 0 for none."""
    _check_lengths(words, scores)
    return [scores[word] if word >= 0 else 0.0 for word in token_words(words, spans)]


def split_word_scores(words: Sequence[Word], scores: Sequence[float], spans: Sequence[Span]) -> list[float]:
    """Each word's score is divided over the tokens that hold its characters, by their share of them.

    The scores of the tokens sum to those of the words, however the words are tokenised; a word that no token
    overlaps (possible only for text that these tokens do not spell) is left out.
    """
    _check_lengths(words, scores)
    pairs = list(_overlaps(words, spans))
    covered = [0.0] * len(words)
    for word, _, overlap in pairs:
        covered[word] += overlap
    received = [0.0] * len(spans)
    for word, token, overlap in pairs:
        received[token] += scores[word] * overlap / covered[word]
    return received


def pool_token_scores(
    words: Sequence[Word], token_scores: Sequence[float], spans: Sequence[Span], missing: float
) -> list[float]:
    """Each word's score: the mean of its tokens' scores, weighted by the characters that they share with it.

    A word without a token (cut off by a length limit, or removed by the tokenizer's normaliser) scores `missing`.
    """
    _check_lengths(spans, token_scores)
    total = [0.0] * len(words)
    covered = [0.0] * len(words)
    for word, token, overlap in _overlaps(words, spans):
        total[word] += overlap * token_scores[token]
        covered[word] += overlap
    return [score / weight if weight > 0 else missing for score, weight in zip(total, covered, strict=True)]


def spread_word_scores(
    words: Sequence[Word], scores: Sequence[float], spans: Sequence[Span], mode: Literal["copy", "split"]
) -> list[float]:
    """`copy_word_scores` or `split_word_scores`, by name."""
    return (copy_word_scores if mode == "copy" else split_word_scores)(words, scores, spans)


def token_lines(text: str, words: Sequence[Word], spans: Sequence[Span]) -> list[int]:
    """The query (line of `text`, from 0) each token belongs to; `NO_LINE` for line breaks and empty tokens.

    A token that overlaps a word belongs to the word's line, even when it holds a line break too.
    """
    lines: list[int] = []
    for word, (start, end) in zip(token_words(words, spans), spans, strict=True):
        if word >= 0:
            lines.append(words[word].line)
        elif end <= start or "\n" in text[int(start) : int(end)]:
            lines.append(NO_LINE)
        else:
            lines.append(text.count("\n", 0, int(start)))
    return lines


def _overlaps(words: Sequence[Word], spans: Sequence[Span]) -> Iterator[tuple[int, int, float]]:
    """(word index, token index, shared characters) of every pair that overlaps. Words and tokens are in order."""
    first = 0
    for token, (start, end) in enumerate(spans):
        if end <= start:
            continue
        while first < len(words) and words[first].end <= start:
            first += 1
        word = first
        while word < len(words) and words[word].start < end:
            shared = min(words[word].end, end) - max(words[word].start, start)
            if shared > 0:
                yield word, token, shared
            word += 1


def _decode_bytes(data: bytes) -> tuple[str, list[float]]:
    """Text of `data`, and for each byte offset (the end included) its position in characters."""
    chars: list[str] = []
    positions: list[float] = []
    for index, char in enumerate(data.decode("utf-8", errors="surrogateescape")):
        width = 1 if "\udc80" <= char <= "\udcff" else len(char.encode("utf-8"))
        positions.extend(index + byte / width for byte in range(width))
        chars.append("\ufffd" if "\udc80" <= char <= "\udcff" else char)
    positions.append(float(len(chars)))
    return "".join(chars), positions


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [inner for step in decoder["decoders"] for inner in _decoder_steps(step)]
    return [decoder]


def _check_decoder(tokenizer_name: str, steps: list[dict[str, Any]]) -> None:
    """Refuse a decoder that does anything which `TokenDecoder` does not follow id by id."""
    kinds = [step["type"] for step in steps]
    known = set(kinds) <= {*_BASE_DECODERS, "ByteFallback", "Fuse", "Strip"}
    one_base = len(set(kinds) & set(_BASE_DECODERS)) == 1
    literal = all("String" in step["pattern"] for step in steps if step["type"] == "Replace")
    strips = [step for step in steps if step["type"] == "Strip"]
    strips_at_start = all((step["content"], step["start"], step["stop"]) == (" ", 1, 0) for step in strips)
    strips_whole_text = not strips or "Fuse" in kinds[: kinds.index("Strip")]
    if not (known and one_base and literal and strips_at_start and strips_whole_text and len(strips) <= 1):
        raise InputError(
            f"{tokenizer_name} decodes with {json.dumps(steps)}: its tokens cannot be traced to characters; use a "
            "byte-level BPE, SentencePiece or WordPiece tokenizer"
        )


def _strip_first_space(pieces: list[bytes]) -> None:
    """Take one space off the start of the text that `pieces` spell, in place."""
    for index, piece in enumerate(pieces):
        if piece:
            pieces[index] = piece.removeprefix(b" ")
            return


def _check_lengths(items: Sequence[Any], values: Sequence[Any]) -> None:
    if len(items) != len(values):
        raise ValueError(f"{len(values)} values for {len(items)} items")
