"""Write the capitals of words as signs: `case=marked`.

A word is a run of letters and digits. A word whose only capital is its first character is written as the sign
FIRST and the word in lower case. A word without lower-case letters is written as the sign ALL and the word in
lower case. A word of one letter counts as the first kind, so "A" and "The" start with the same sign. A word
that `restore` would not give back, such as "iPhone" or "STRAẞE", is not changed.

A space separates the sign and the word: "(Hacker News" becomes "(# hacker # news", where # is FIRST. The word
therefore has the tokens that it has after any space, even if there was no space before it.
"""

from __future__ import annotations

import re

FIRST, ALL = "\ue000", "\ue001"  # private-use characters, which are not part of a word
SIGNS = frozenset((FIRST, ALL))
WORD = re.compile(r"[^\W_]+")
MARKED = re.compile(rf"([{FIRST}{ALL}])(?: ([^\W_]+))?")


def mark(title: str) -> str:
    """Return a title with signs for the capitals of its words. The title must not contain a sign."""
    return WORD.sub(_mark_word, title)


def restore(text: str) -> str:
    """Return the title of a marked text. A sign without a word, which only a model writes, is dropped."""
    return MARKED.sub(_restore_word, text)


def _mark_word(match: re.Match[str]) -> str:
    word = match[0]
    lower = word.lower()
    if lower == word:
        return word
    for sign in (FIRST, ALL):
        marked = f"{sign} {lower}"
        if restore(marked) == word:
            return marked
    return word


def _restore_word(match: re.Match[str]) -> str:
    sign = match[1]
    word = match[2] or ""
    if sign == ALL:
        return word.upper()
    return word[:1].upper() + word[1:]
