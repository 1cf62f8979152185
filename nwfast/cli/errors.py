"""What the user gave and cannot be served."""

import difflib
from collections.abc import Sequence

_MOST_NAMES = 30


class CommandError(Exception):
    """Ends a command with its message, one line, and status 2."""


def unknown(what: str, name: str, known: Sequence[str], where: str) -> CommandError:
    """The error that `where` has no column, feature, ... `name`, with the nearest names and all of them."""
    lower = {other.lower(): other for other in known}
    near = [lower[other] for other in difflib.get_close_matches(name.lower(), lower, 3, 0.6)]
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    more = f", and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    listed = ", ".join(known[:_MOST_NAMES])
    return CommandError(f"{where} has no {what} {name!r}; {hint}It has {listed}{more}")
