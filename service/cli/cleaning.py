"""Text of others, before it reaches a terminal: an escape sequence in an answer must not move the
cursor, set the title or write to the clipboard.
"""

import unicodedata

TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
MARK = "\ufffd"


def clean(text: str) -> str:
    """The text with what a terminal would obey, or what turns the direction of writing, replaced
    by a mark.
    """
    return "".join(c if _is_harmless(c) else MARK for c in text.replace("\r\n", "\n"))


def _is_harmless(character: str) -> bool:
    if unicodedata.category(character) in ("Cc", "Cs"):
        return character in "\n\t"
    return character not in TURNING
