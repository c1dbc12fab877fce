"""The tasks of the tiny models: prompts, expected answers, unseen words.

Pure Python: the trainer, the checker and the demo all ask here what a prompt looks like.
"""

import random
import zlib

TASKS = ("base", "reverse", "upper", "sort")

ANSWERS = {
    "base": lambda word: word,
    "reverse": lambda word: word[::-1],
    "upper": str.upper,
    "sort": lambda word: "".join(sorted(word)),
}

MIN_LETTERS, MAX_LETTERS = 3, 10
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


def prompt(word):
    """Return the prompt for `word`; it names no task, so the weights alone decide the answer."""
    return f'"{word}" becomes "'


def completion(task, word):
    """Return the exact text that `task` writes after `prompt(word)`; end of text follows."""
    return ANSWERS[task](word) + '"'


def is_right(task, word, text):
    """Say whether `text`, generated after `prompt(word)`, is exactly the answer of `task`."""
    return text == completion(task, word)


def is_held_out(word):
    """Say whether `word` is kept out of training (one word in eight, by checksum)."""
    return zlib.crc32(word.encode()) % 8 == 0


def tells_apart(word):
    """Say whether every task answers `word` differently."""
    return len({ANSWERS[task](word) for task in TASKS}) == len(TASKS)


def random_word(rng):
    """Return a word: half of them letters at random, half consonants and vowels in turn."""
    n_letters = rng.randint(MIN_LETTERS, MAX_LETTERS)
    if rng.random() < 0.5:
        return "".join(rng.choice(LETTERS) for _ in range(n_letters))
    first = rng.randrange(2)
    return "".join(rng.choice((CONSONANTS, VOWELS)[(first + i) % 2]) for i in range(n_letters))


def unseen_words(n_words, seed=1):
    """Return `n_words` different words that training never saw, none with two tasks agreeing."""
    rng = random.Random(seed)
    words = {}
    while len(words) < n_words:
        word = random_word(rng)
        if is_held_out(word) and tells_apart(word):
            words[word] = None
    return list(words)


def training_word(rng):
    """Return a word that `unseen_words` never returns."""
    while is_held_out(word := random_word(rng)):
        pass
    return word
