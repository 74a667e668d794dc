"""Did-you-mean."""

import difflib
from collections.abc import Iterable


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was probably meant to be, whatever its case, or None."""
    by_folded = {choice.casefold(): choice for choice in choices}
    found = difflib.get_close_matches(word.casefold()[:200], by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A clause to end a message with: "; did you mean 'X'?", or nothing if no choice is close."""
    found = closest(word, choices)
    return "" if found is None else f"; did you mean '{found}'?"


def valid_are(word: str, choices: Iterable[str]) -> str:
    """As `did_you_mean`, followed by all choices in the order given."""
    choices = tuple(choices)
    meant = did_you_mean(word, choices)
    return f"{meant} Valid: {', '.join(choices)}" if meant else f"; valid: {', '.join(choices)}"
