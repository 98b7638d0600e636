"""Text from elsewhere on its way to people."""

import re

# Shown as nothing (Unicode's Default_Ignorable_Code_Point), though Python takes them for printable.
_UNSEEN = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def printable(text: str) -> str:
    r"""The text on one line: whatever would move the cursor, end the line or hide is shown escaped, as in `\n`."""
    if text.isprintable() and not _UNSEEN.search(text):
        return text
    return "".join(
        char if char.isprintable() and not _UNSEEN.match(char) else char.encode("unicode_escape").decode()
        for char in text
    )
