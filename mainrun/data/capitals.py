"""Write the capitals of words as signs: `case=marked`.

A word is a run of letters and digits. A word whose only capital is its first character is written as the sign
FIRST and the word in lower case. A word without lower-case letters is written as the sign ALL and the word in
lower case. A word of one letter counts as the first kind, so "A" and "The" begin alike. A word that
`restore` would not give back, such as "iPhone" or "STRAẞE", is not changed.

The sign stands before the space in front of the word: " Hacker News" becomes "# hacker# news", where # is
FIRST. A word therefore keeps the tokens that begin with a space. `mark` adds a space to the start of each
title, so that its first word has the same tokens as other words.
"""

from __future__ import annotations

import re

FIRST, ALL = "\ue000", "\ue001"  # private-use characters, which are not part of a word
SIGNS = frozenset((FIRST, ALL))
WORD = re.compile(r"( ?)([^\W_]+)")
MARKED = re.compile(rf"([{FIRST}{ALL}])( ?)([^\W_]*)")


def mark(title: str) -> str:
    """Return a title with signs for the capitals of its words. The title must not contain a sign."""
    return WORD.sub(_mark_word, f" {title}")


def restore(text: str) -> str:
    """Return the title of a marked text. A sign without a word, which only a model writes, is dropped."""
    return _restore_words(text).removeprefix(" ")


def _mark_word(match: re.Match[str]) -> str:
    space, word = match.groups()
    lower = word.lower()
    if lower == word:
        return match[0]
    for sign in (FIRST, ALL):
        marked = f"{sign}{space}{lower}"
        if _restore_words(marked) == match[0]:
            return marked
    return match[0]


def _restore_words(text: str) -> str:
    return MARKED.sub(_restore_word, text)


def _restore_word(match: re.Match[str]) -> str:
    sign, space, word = match.groups()
    if sign == ALL:
        return space + word.upper()
    return space + word[:1].upper() + word[1:]
