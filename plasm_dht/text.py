"""Text from elsewhere on its way to people."""


def printable(text: str) -> str:
    r"""The text on one line: whatever would move the cursor, end the line or hide is shown escaped, as in `\n`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
