"""Small tokenizers of every kind that the alignment claims to follow, made from a few invented lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "best running shoes for flat feet",
    "running shoes sale near me",
    "how to clean suede boots at home",
    "café crème brûlée recipe, naïve résumé",
    "北京 天气 预报 北京烤鸭 做法",
    "ビール・ワイン 東京 レストラン",
    "don't buy wi-fi routers! cheap?",
    "👩‍👩‍👧 emoji meaning 🙂🙃 party 🎉",
    "Ünïcode Straße Ελληνικά поиск",
    "lines\nof\nqueries",
] * 4
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


@cache
def byte_level(add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2 style: a token may hold a part of a UTF-8 character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend)


@cache
def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """Llama style: pieces with a leading-space mark, bytes for what no piece spells."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS[:5], trainers.BpeTrainer(vocab_size=250, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(learned["vocab"], key=learned["vocab"].get)
    backend = Tokenizer(
        models.BPE(
            vocab={piece: id_ for id_, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bos = ("<s>", SPECIAL.index("<s>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[bos]
    )
    return _wrap(backend)


@cache
def unigram() -> PreTrainedTokenizerFast:
    """XLM-R style: Unigram pieces behind a Metaspace."""
    # Written down, not trained: the library's Unigram and WordPiece trainers break ties differently in every process.
    pieces = ["▁", "▁best", "▁run", "ning", "▁shoes", "sho", "es", "▁re", "ci", "▁北京", "ルイ", "▁a", "ll"]
    characters = sorted(set("".join(CORPUS)) - {" "})
    vocabulary = [(mark, 0.0) for mark in SPECIAL] + [(piece, -4.0) for piece in pieces]
    vocabulary += [(character, -8.0) for character in characters]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    marks = [("<s>", SPECIAL.index("<s>")), ("</s>", SPECIAL.index("</s>"))]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=marks
    )
    return _wrap(backend)


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """BERT style: lower-cased, accents stripped, `##` inside a word."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["best", "running", "shoes", "boots", "feet", "near", "me", "cafe", "home", "suede", "flat", "for", "at"]
    parts = ["recip", "rout", "##ers", "##ning", "##es", "sh", "clean", "cheap", "searched", "clicked"]
    characters = sorted(set(normalizers.BertNormalizer(lowercase=True).normalize_str("".join(CORPUS))) - {" ", "\n"})
    vocabulary = [*special, *words, *parts, *characters, *(f"##{character}" for character in characters)]
    backend = Tokenizer(
        models.WordPiece({piece: id_ for id_, piece in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    marks = [(mark, special.index(mark)) for mark in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )


ALL: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "byte_level_prefix_space": lambda: byte_level(add_prefix_space=True),
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram": unigram,
    "word_piece": word_piece,
}


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(["addedword"])
    return tokenizer
