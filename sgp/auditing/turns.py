"""What a tokenizer's chat template says of turns: how they end, and how each role's begin.

A few chats of words that occur nowhere else are rendered, and what the template wrote between the
words is read. An assistant's turn ends with the first added token that stands after it at the end
of a chat and before a user's turn alike; where those differ, with the first of each that is no
beginning of another turn. Nothing is known of a tokenizer without a template.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

WORDS = ("zqaxa", "zqbxb", "zqcxc", "zqdxd", "zqexe")
MARKS = re.compile(r"think|reason|tool|func|arg_|python", re.IGNORECASE)
"""Added tokens that a model writes within an answer."""
THOUGHT = re.compile(r"think|reason", re.IGNORECASE)
MEDIA = re.compile(r"image|img|video|audio|vision|media|patch|sound", re.IGNORECASE)
BEGINS = re.compile(r"start|begin|header|user|assistant|system|human|inst|sop|gmask", re.IGNORECASE)
"""Added tokens that begin a turn or a text, by their names, where there is no template."""


@dataclass(frozen=True)
class Turns:
    """What is known of a chat template."""

    ends: frozenset[int] = frozenset()  # tokens that it writes after an assistant's turn
    headers: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (role, the tokens its turn begins with)
    several_begins: bool = False  # a chat has more than one begin of text
    unlearned: frozenset[int] = frozenset()  # tokens that are no part of any answer
    calls_end: bool = True  # a call of a tool has an end before the tool's turn


_KNOWN: weakref.WeakKeyDictionary[Any, tuple[Any, Turns]] = weakref.WeakKeyDictionary()


def learn(tokenizer: Any) -> Turns:
    """Ask a tokenizer's chat template, once; nothing is known without one.

    Example:
        >>> learn(None) == Turns(ends=frozenset(), headers=(), unlearned=frozenset())
        True
    """
    if tokenizer is None:
        return Turns()
    words = inner(tokenizer)
    template = getattr(tokenizer, "chat_template", None) or getattr(words, "chat_template", None)
    key = (str(template), len(getattr(words, "all_special_ids", ())))
    try:
        known = _KNOWN.get(tokenizer)
    except TypeError:  # cannot be a key
        return _learn(words, template)
    if known is None or known[0] != key:
        known = (key, _learn(words, template))
        with contextlib.suppress(TypeError):  # no weak reference
            _KNOWN[tokenizer] = known
    return known[1]


def inner(tokenizer: Any) -> Any:
    """The tokenizer of a processor, which a Trainer of a vision model has in its place."""
    found = getattr(tokenizer, "tokenizer", None)
    known = getattr(tokenizer, "all_special_ids", None)
    return tokenizer if found is None or known is not None else found


def text_of(tokenizer: Any, *tokens: int) -> str:
    """Tokens as text, or their numbers, if there is no tokenizer or it cannot decode them."""
    if tokenizer is not None:
        with contextlib.suppress(Exception):  # a foreign tokenizer raises what it likes
            return str(tokenizer.decode(list(tokens)))
    return " ".join(map(str, tokens))


def is_blank(tokenizer: Any, token: int) -> bool:
    """Whether a token is white space alone, as a line break before the end of a turn is."""
    text = text_of(tokenizer, token)
    return bool(text) and not text.strip()


def _learn(tokenizer: Any, template: Any) -> Turns:
    added = _added(tokenizer)
    turns = Turns(unlearned=_unlearned(tokenizer, added, ()))
    if not template or not hasattr(tokenizer, "apply_chat_template"):
        return turns
    try:
        return _of_template(_Asked(tokenizer, template, added), turns)
    except Exception:  # noqa: BLE001  (a foreign tokenizer raises what it likes)
        return turns


def _of_template(ask: _Asked, turns: Turns) -> Turns:
    tokenizer, added = ask.tokenizer, ask.added
    between = ask.between(_chat())
    if between is None:  # templates of vision models may want lists of parts
        ask.in_parts = True
        between = ask.between(_chat())
    if between is None:
        return turns
    start = ask.started()
    ends = frozenset({*ask.ends(between, start), *ask.end_of_a_call()})
    known = ends | own_ends(tokenizer)
    headers = tuple(ask.headers(between, start, known))
    begin = getattr(tokenizer, "bos_token_id", None)
    whole = ask.ids("".join(between))
    return Turns(
        ends=ends,
        headers=headers,
        several_begins=begin is not None and whole.count(begin) > 1,
        unlearned=_unlearned(tokenizer, added, headers) - known,
        calls_end=ask.calls_end(known),
    )


def _chat() -> list[dict[str, Any]]:
    roles = ("user", "assistant", "user", "assistant")
    return [{"role": r, "content": w} for r, w in zip(roles, WORDS, strict=False)]


def own_ends(tokenizer: Any) -> frozenset[int]:
    """The tokenizer's end of text."""
    found = getattr(tokenizer, "eos_token_id", None)
    return frozenset([found]) if isinstance(found, int) else frozenset(found or ())


def _added(tokenizer: Any) -> dict[str, int]:
    """Tokens that the tokenizer never makes of several pieces."""
    found: Any = getattr(tokenizer, "get_added_vocab", dict)()
    return dict(found) if isinstance(found, Mapping) else {}


def _unlearned(
    tokenizer: Any, added: Mapping[str, int], headers: tuple[tuple[str, tuple[int, ...]], ...]
) -> frozenset[int]:
    """Begin of text, padding, media, and what turns begin with; the special ones, if nameless."""
    special = frozenset(getattr(tokenizer, "all_special_ids", ()))
    if not added:
        return special
    names = {token: name for name, token in added.items()}
    found = {token for name, token in added.items() if MEDIA.search(name) and token in special}
    for name in ("bos_token_id", "pad_token_id", "cls_token_id", "mask_token_id"):
        token = getattr(tokenizer, name, None)
        found |= {token} if isinstance(token, int) else set()
    of_headers = {token for _, ids in headers for token in ids if token in names}
    if not headers:
        of_headers = {t for t, name in names.items() if BEGINS.search(name) and t in special}
    return frozenset(found | {t for t in of_headers if not MARKS.search(names[t])})


class _Asked:
    """A tokenizer that is asked for what its template writes."""

    def __init__(self, tokenizer: Any, template: Any, added: Mapping[str, int]) -> None:
        self.tokenizer = tokenizer
        own = getattr(tokenizer, "chat_template", None)  # or else it is a processor's
        self.given = {} if own else {"chat_template": template}
        self.added = added
        self.in_parts = False  # contents are lists of parts, one of text each
        names = sorted(added, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str | None:
        if self.in_parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        try:
            options |= {"tokenize": False, **self.given}
            text = self.tokenizer.apply_chat_template(messages, **options)
        except Exception:  # noqa: BLE001  (a template raises what it likes)
            return None
        return text if isinstance(text, str) else None

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def between(self, messages: list[dict[str, Any]]) -> list[str] | None:
        """What is written before, between and after the messages' contents."""
        text = self.render(messages)
        if text is None:
            return None
        found = []
        for word in (m["content"] for m in messages):
            before, there, text = text.partition(word)
            if not there:
                return None
            found.append(before)
        return [*found, text]

    def started(self) -> str:
        """How an assistant's turn begins, by the generation prompt."""
        asked = _chat()[:1]
        without, given = self.render(asked), self.render(asked, add_generation_prompt=True)
        if without is None or given is None or not given.startswith(without):
            return ""
        return given[len(without) :]

    def first(self, text: str) -> Iterator[int]:
        """The first added token in a text."""
        found = self.pattern.search(text)
        if found:
            yield self.added[found.group()]

    def ends(self, between: list[str], start: str) -> Iterator[int]:
        _, to_assistant, to_user, _, after = between
        begins = set(self.first(start))
        shared = list(self.first(self._common(to_user, after)))
        if shared:
            yield from shared
            return
        yield from (token for token in self.first(after) if token not in begins)
        both = self.first(self._common(to_assistant, to_user))
        yield from (token for token in both if token not in begins)

    def _common(self, one: str, other: str) -> str:
        """What both begin with, whole tokens of it."""
        text = _prefix(one, other)
        for found in (*self.pattern.finditer(one), *self.pattern.finditer(other)):
            if found.start() < len(text) < found.end():
                text = text[: found.start()]
        return text

    def end_of_a_call(self) -> Iterator[int]:
        """The last added token after the arguments of a tool's call."""
        text = self.render([*_chat()[:1], _call()], tools=[_tool()])
        if text is None or WORDS[4] not in text:
            return
        found = self.pattern.findall(text.rpartition(WORDS[4])[2])
        if found and not MARKS.search(found[-1]):
            yield self.added[found[-1]]

    def headers(
        self, between: list[str], start: str, ends: frozenset[int]
    ) -> list[tuple[str, tuple[int, ...]]]:
        """How each role's turn begins, if with an added token; without them for all, none."""
        _, to_assistant, to_user, _, _ = between
        whole = self.from_end(to_assistant, ends)
        assistant = self.starts(_prefix(start, whole) or whole, thinks=False)
        user = self.starts(self.from_end(to_user, ends))
        if not assistant or not user or assistant == user:
            return []
        found = [("assistant", assistant), ("user", user)]
        begin = (getattr(self.tokenizer, "bos_token_id", None),)
        system = self.between([{"role": "system", "content": WORDS[4]}, *_chat()[:2]])
        if system is not None:
            of_system = self.starts(self.from_end(system[0], ends))
            of_others = any(of_system[: len(ids)] == ids for ids in (user, assistant))
            if of_system not in ((), begin) and not of_others:
                found.append(("system", of_system))
        found += self.of_tools(found, ends)
        return found

    def of_tools(
        self, others: list[tuple[str, tuple[int, ...]]], ends: frozenset[int]
    ) -> list[tuple[str, tuple[int, ...]]]:
        """A tool's result, and the answer to it: not all templates begin that as another turn."""
        around = self.around_a_result()
        if around is None:
            return []
        to_result, to_answer = (self.from_end(text, ends) for text in around)
        to_result = to_result.partition("find")[0]
        tool = self.starts(to_result)
        if tool == dict(others)["user"]:  # a user's turn with a mark of its own
            tool = self.starts(to_result, words=r"[^\"{]*")
        back = self.starts(to_answer, thinks=False)
        if not tool or not back or any(ids[: len(tool)] == tool for _, ids in others):
            return []
        begins = [ids for role, ids in others if role == "assistant"]
        known = any(back[: len(ids)] == ids for ids in begins)
        return [("tool", tool), *([] if known else [("assistant", back)])]

    def calls_end(self, ends: frozenset[int]) -> bool:
        """Whether an end stands between a call and its result, as far as there are any."""
        around = self.around_a_result()
        found = self.pattern.findall(around[0]) if around is not None else []
        return around is None or any(self.added[name] in ends for name in found)

    def around_a_result(self) -> tuple[str, str] | None:
        """What is written between a call's arguments and its result, and on to the answer."""
        result, answer = {"role": "tool", "name": "find", "content": WORDS[3]}, WORDS[2]
        messages = [*_chat()[:1], _call(), result, {"role": "assistant", "content": answer}]
        text = self.render(messages, tools=[_tool()])
        if text is None or not 0 <= text.rfind(WORDS[4]) < text.find(WORDS[3]) < text.find(answer):
            return None
        at = text.find(WORDS[3])
        return text[text.rfind(WORDS[4]) : at], text[at : text.find(answer)]

    def from_end(self, text: str, ends: frozenset[int]) -> str:
        """What follows the last end of a turn in a text, or the end, if that begins the next."""
        found = [m for m in self.pattern.finditer(text) if self.added[m.group()] in ends]
        if not found:
            return text
        after = text[found[-1].end() :]
        return after if self.pattern.search(after) else text[found[-1].start() :]

    def starts(
        self, text: str, *, thinks: bool = True, words: str = r"[^\s\"{]*"
    ) -> tuple[int, ...]:
        """The tokens of a header: its added ones but begin of text, and `words` after the last."""
        found = list(self.pattern.finditer(text))
        if len(found) > 1 and found[0].group() == getattr(self.tokenizer, "bos_token", None):
            found = found[1:]
        if not found:
            return ()
        if not thinks:
            marks = [m.start() for m in found[1:] if THOUGHT.search(m.group())]
            text = text[: min(marks, default=len(text))]
        last = [m.end() for m in found if m.end() <= len(text)][-1]
        word = re.match(words, text[last:])  # a role's name may end a header, no content
        end = last + (word.end() if word else 0)
        return tuple(self.ids(text[found[0].start() : end].rstrip()))


def _prefix(one: str, other: str) -> str:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: sum(1 for _ in pairs)]


def _call() -> dict[str, Any]:
    call = {"name": "find", "arguments": {"x": WORDS[4]}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "123456789", "function": call}],
    }


def _tool() -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
    return {
        "type": "function",
        "function": {"name": "find", "description": "Find.", "parameters": parameters},
    }
