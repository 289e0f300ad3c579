"""Attributes that a patch replaces, and how each goes back."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

_logger = logging.getLogger("padless")

ABSENT = object()  # nothing stood there: a module's forward is its class's


@dataclass(frozen=True)
class Change:
    """One attribute that was replaced.

    Attributes:
        owner: class or module instance.
        attribute: its name.
        old: what stood there; `ABSENT` if nothing of the owner's own did.
        new: what stands there now.
        where: dotted name, for people.
    """

    owner: Any
    attribute: str
    old: Any
    new: Any
    where: str

    def apply(self) -> None:
        """Puts the new value in place."""
        setattr(self.owner, self.attribute, self.new)

    def revert(self) -> None:
        """Puts the old value back, unless somebody else has replaced ours since."""
        if vars(self.owner).get(self.attribute, ABSENT) is not self.new:
            _logger.warning("%s was replaced again since; undo leaves it as it is", self.where)
        elif self.old is ABSENT:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, self.old)
