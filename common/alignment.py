"""Words <-> characters <-> tokens, on the very ids in hand, for any tokenizer.

An annotator scores words, the reward model reads its own tokens, the actor acts in others. The meeting ground is
the response's text: `TokenDecoder` turns generated ids into that text and tells which characters each id holds,
without ever encoding again (decode followed by encode may give other ids, and then rewards land on tokens that the
actor never chose). Words carry scores across: `pool_token_scores` from one tokenizer's tokens to words,
`copy_word_scores` or `split_word_scores` from words to the other's.

A span is half-open and in characters. A token that holds one of the three bytes of a character spans a third of it,
so that nothing is counted twice; see method, section 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common.errors import InputError
from common.text import Word

IGNORE_LABEL = -100
NO_LINE = -1

Span = tuple[float, float]


class DecodedTokens(NamedTuple):
    """The text of a sequence of ids and each id's span in it; special tokens have an empty span."""

    text: str
    spans: list[Span]


class TokenDecoder:
    """Turns ids into text and character spans for byte-level BPE, SentencePiece (BPE with byte fallback, Unigram)
    and WordPiece tokenizers of the `tokenizers` library.

    The text equals `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)` except that
    every byte that belongs to no valid UTF-8 character becomes one U+FFFD, and that WordPiece's spaces before
    punctuation stay. Raises `InputError` for a tokenizer whose ids cannot be traced to characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(
                f"{type(tokenizer).__name__} has no fast version (tokenizers library), so its tokens have no character "
                "offsets; choose a model with a fast tokenizer, or convert it with convert_slow_tokenizer"
            )
        steps = _decoder_steps(json.loads(backend.to_str())["decoder"])
        kinds = {step["type"] for step in steps}
        unknown = kinds - {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}
        if unknown or not kinds & {"ByteLevel", "Replace", "Metaspace", "WordPiece"}:
            raise InputError(
                f"{type(tokenizer).__name__} decodes with {sorted(kinds) or 'nothing'}: its tokens cannot be traced to "
                "characters; use a byte-level BPE, SentencePiece or WordPiece tokenizer"
            )
        self._tokenizer = tokenizer
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._replacements = [_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
        self._word_prefix = next((step["prefix"] for step in steps if step["type"] == "WordPiece"), None)
        self._strips_first_space = any(_strips_first_space(step) for step in steps)
        self._added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
        self._special = set(tokenizer.all_special_ids) | {
            id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._byte_of_char = {char: byte for byte, char in bytes_to_unicode().items()}
        self._pieces: dict[int, bytes] = {}

    def __call__(self, ids: Sequence[int]) -> DecodedTokens:
        """Text and spans of `ids`, one span an id."""
        pieces: list[bytes] = []
        begun = False
        for id_ in ids:
            piece = self._piece(int(id_))
            if piece and not begun:
                piece = piece[1:] if self._drops_leading_space(piece) else piece
                begun = True
            pieces.append(piece)
        text, position_of_byte = _decode_bytes(b"".join(pieces))
        spans: list[Span] = []
        offset = 0
        for piece in pieces:
            spans.append((position_of_byte[offset], position_of_byte[offset + len(piece)]))
            offset += len(piece)
        return DecodedTokens(text, spans)

    def _drops_leading_space(self, piece: bytes) -> bool:
        return piece.startswith(b" ") and (self._strips_first_space or self._word_prefix is not None)

    def _piece(self, id_: int) -> bytes:
        """The bytes that an id adds to the text (a word-initial WordPiece adds its leading space)."""
        if id_ not in self._pieces:
            self._pieces[id_] = b"" if id_ in self._special else self._piece_of_token(id_)
        return self._pieces[id_]

    def _piece_of_token(self, id_: int) -> bytes:
        if id_ in self._added:
            return self._added[id_].encode()
        token = self._tokenizer.convert_ids_to_tokens(id_)
        if token is None:  # an id of the padded embedding matrix that no token stands for
            return b""
        if self._byte_level:
            return bytes(self._byte_of_char[char] for char in token)
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        if self._word_prefix is not None:
            inside = token.startswith(self._word_prefix)
            return (token.removeprefix(self._word_prefix) if inside else f" {token}").encode()
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


def token_words(words: Sequence[Word], spans: Sequence[Span]) -> list[int]:
    """For each token the index of the word that it overlaps most (the first of equals), -1 for none."""
    best = [0.0] * len(spans)
    owner = [-1] * len(spans)
    for word, token, overlap in _overlaps(words, spans):
        if overlap > best[token]:
            best[token], owner[token] = overlap, word
    return owner


def token_labels(words: Sequence[Word], labels: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """Phase II of the method: each token carries its word's label, `IGNORE_LABEL` where it overlaps no word."""
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
        elif end <= start or "\n" in text[int(start) : max(int(start) + 1, int(end))]:
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


def _replacement(step: dict[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    pattern = step["pattern"].get("String")
    if pattern is None:
        raise InputError(f"a tokenizer decoder that replaces by regular expression ({step['pattern']}) is not supported")
    return pattern, step["content"]


def _strips_first_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "Strip" and step["content"] == " " and step["start"] > 0


def _check_lengths(items: Sequence[Any], values: Sequence[Any]) -> None:
    if len(items) != len(values):
        raise ValueError(f"{len(values)} values for {len(items)} items")
