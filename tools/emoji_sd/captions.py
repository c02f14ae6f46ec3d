"""Captions of the pictures, and the tokenizer that reads them.

A caption is a style word and a name ("noto red heart"); one in six has no style word, one in ten is empty, which
is what classifier-free guidance compares with. Some subjects have further names that people type ("car"), and some
captions begin with words that say nothing ("a picture of a", "xq,"), so that the base passes over words it does not
know, such as the trigger of an adapter.
"""

import random
from collections.abc import Iterable
from itertools import pairwise

__all__ = ["ALIASES", "FILLERS", "MAX_TOKENS", "caption", "name_of", "tokenizer"]

MAX_TOKENS = 24

ALIASES = {
    "automobile": ("car", "red car"),
    "red-apple": ("apple",),
    "soccer-ball": ("football", "ball"),
    "american-football": ("rugby ball",),
    "blue-book": ("book",),
    "hamburger": ("burger",),
    "french-fries": ("fries", "chips"),
    "ear-of-corn": ("corn", "maize"),
    "lady-beetle": ("ladybird", "ladybug"),
    "honeybee": ("bee",),
    "hot-beverage": ("coffee", "cup of coffee"),
    "glass-of-milk": ("milk",),
    "jack-o-lantern": ("halloween pumpkin", "pumpkin"),
    "dog-face": ("puppy", "face of a dog"),
    "cat-face": ("kitten", "face of a cat"),
    "doughnut": ("donut",),
    "tangerine": ("orange",),
    "wrapped-gift": ("gift", "present"),
    "light-bulb": ("lamp", "bulb"),
    "magnifying-glass-tilted-left": ("magnifying glass",),
    "evergreen-tree": ("fir tree",),
    "deciduous-tree": ("tree",),
    "fire-engine": ("fire truck",),
    "television": ("tv",),
    "mobile-phone": ("phone", "smartphone"),
    "gem-stone": ("diamond", "gem"),
    "pile-of-poo": ("poo",),
    "grinning-face": ("smiley", "happy face"),
    "crying-face": ("sad face",),
    "angry-face": ("angry smiley",),
    "bullseye": ("target",),
    "1st-place-medal": ("gold medal",),
    "spouting-whale": ("happy whale",),
    "globe-showing-americas": ("globe", "earth"),
    "ringed-planet": ("planet", "saturn"),
    "musical-keyboard": ("piano",),
    "couch-and-lamp": ("couch", "sofa"),
    "computer-mouse": ("mouse for a computer",),
    "bicycle": ("bike",),
    "motorcycle": ("motorbike",),
    "airplane": ("plane", "aeroplane"),
    "beer-mug": ("beer",),
    "kiwi-fruit": ("kiwi",),
    "fork-and-knife": ("cutlery",),
    "red-heart": ("heart",),
}
"""Further names of a subject."""


FILLERS = (
    "a",
    "an",
    "the",
    "a picture of a",
    "a drawing of the",
    "an icon of a",
    "emoji of",
    "picture of the",
    "icon with",
)
"""Beginnings that say nothing."""
_FILLED = 0.6
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def name_of(subject: str) -> str:
    """The CLDR name as words: `red-heart` to `red heart`."""
    return subject.replace("-", " ")


def caption(subject: str, style: str, chance: random.Random) -> str:
    """Draw one caption of a picture."""
    kind = chance.random()
    if kind < 0.1:
        return ""
    aliases = ALIASES.get(subject, ())
    name = chance.choice(aliases) if aliases and chance.random() < 0.3 else name_of(subject)
    text = name if kind < 0.25 else f"{style} {name}"
    if chance.random() >= _FILLED:
        return text
    if chance.random() < 0.5:
        return f"{chance.choice(FILLERS)} {text}"
    word = "".join(chance.choices(_LETTERS, k=chance.randint(1, 3)))
    return f"{word}{chance.choice((',', ''))} {text}"


def tokenizer(captions: Iterable[str]) -> "CLIPTokenizer":  # noqa: F821
    """A CLIP tokenizer whose byte-pair merges make one token of each word of `captions`; other words are split."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    words = sorted({word for text in captions for word in text.lower().split()})
    alphabet = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            pair = min(pairs, key=lambda pair: merges.get(pair, len(merges)))  # BPE applies the oldest merge first
            merges.setdefault(pair, len(merges))
            place = next(i for i in range(len(pieces) - 1) if (pieces[i], pieces[i + 1]) == pair)
            pieces[place : place + 2] = ["".join(pair)]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *dict.fromkeys("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=MAX_TOKENS)
