"""Where a batch's labels are wrong: pure functions of a `View`, for findings and for repair.

(B, T) bool unless said otherwise, about tokens and not about what predicts them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sgp.auditing.turns import MARKS, is_blank, text_of
from sgp.auditing.view import View, later
from sgp.labels import IGNORE

BLANKS = 2  # tokens of white space between an answer and its end, at most
OFTEN = 3  # times that one token ends a sequence: two ends are doubled, more are padding
LONG = 32
"""Times that any token does: rulers and drawn-out words are shorter, as tokenizers merge them."""


def shifted_twice(view: View) -> Tensor:
    """(B,) bool: labels are the next token's, but for one, or one of each sequence."""
    marked = view.labels != IGNORE
    ahead = torch.zeros_like(marked)
    ahead[:, :-1] = marked[:, :-1] & (view.labels[:, :-1] == view.input_ids[:, 1:])
    inner = torch.zeros_like(marked)  # of the last token of a sequence no next one is known
    inner[:, :-1] = marked[:, :-1] & view.attended[:, 1:] & ~view.starts[:, 1:]
    enough = ahead.sum(1) >= (marked.sum(1) - 1).clamp(min=1)
    enough |= inner.any(1) & ~(inner & ~ahead).any(1)
    return differing(view).any(1) & ~itself(view) & enough


def not_the_inputs(view: View) -> Tensor:
    """(B,) bool: labels of another sequence, or that nothing shifts: a guess would be needed."""
    return (differing(view).any(1) | itself(view)) & ~shifted_twice(view)


def differing(view: View) -> Tensor:
    """Labels that are neither -100 nor the token at their place."""
    return (view.labels != IGNORE) & (view.labels != view.input_ids)


def itself(view: View) -> Tensor:
    """(B,) bool: each token is trained to predict itself, and is not just one that repeats."""
    following = torch.zeros_like(view.attended)
    following[:, :-1] = view.targets[:, :-1] == view.input_ids[:, 1:]
    others = view.predicts & (view.targets != view.input_ids)
    return ~others.any(1) & (view.predicts & ~following).any(1)


def first_output_lost(view: View) -> Tensor:
    """First tokens of an output, by the batch's own mask, without loss."""
    if view.outputs is None:
        return torch.zeros_like(view.attended)
    lost = view.outputs & ~view.scored & view.attended & ~view.starts  # a start has no predictor
    lost[:, 1:] &= ~view.outputs[:, :-1] | view.starts[:, :-1]
    return lost


def crossed(view: View) -> Tensor:
    """First tokens of a packed sequence that the one before them would have to predict."""
    found = view.scored & view.starts
    text = view.attended if view.repeats is None else view.attended | view.repeats
    found[:, 1:] &= text[:, :-1]
    return found


def padding_scored(view: View) -> Tensor:
    """Padding with loss, and tokens with loss that padding would have to predict."""
    return view.scored & ~(view.attended & later(view.attended))


def repeated(view: View) -> Tensor:
    """Padding tokens, or ends behind the first, that end a sequence many times over, with loss."""
    found, pads = torch.zeros_like(view.attended), {view.pad} - {None} - view.eos
    for tokens in (pads, view.eos):  # ends may stand before padding
        rest = replace(view, attended=view.attended & ~found)
        tail, first = _tails(rest)
        tail &= torch.isin(view.input_ids, torch.tensor(sorted(tokens), dtype=torch.long))
        found |= tail if tokens is pads else tail & (first < torch.arange(tail.shape[1]))
    return found


def alike(view: View) -> Tensor:
    """Other tokens that end a sequence many times over, with loss, behind an answer: a guess.

    An answer may end in "!!!", and a template in line breaks. So the token stands behind an end, or
    ends several sequences of one length, of some more often than of others, and is no white space;
    or it stands there `LONG` times.
    """
    tail, first = _tails(view)
    tail &= view.scored
    found = torch.zeros_like(tail)
    final = tail.clone()
    final[:, :-1] &= ~tail[:, 1:] | view.starts[:, 1:]
    begin = _since(view, torch.zeros_like(view.input_ids))
    runs: list[tuple[int, int, int, tuple[int, int]]] = []
    times: dict[tuple[int, int], set[int]] = {}
    for row, end in final.nonzero().tolist():
        at, start = int(first[row, end]), int(begin[row, end])
        answered = bool(view.scored[row, start:at].any())
        if answered and bool(tail[row, at]):
            kind = int(view.input_ids[row, end]), end - start
            runs.append((row, at, end, kind))
            times.setdefault(kind, set()).add(end - at)
    for row, at, end, kind in runs:
        behind = int(view.input_ids[row, at - 1]) in view.eos and bool(view.scored[row, at - 1])
        several = behind or len(times[kind]) > 1
        if end - at + 1 >= LONG or (several and not is_blank(view.tokenizer, kind[0])):
            found[row, at : end + 1] = True
    return found


def _tails(view: View) -> tuple[Tensor, Tensor]:
    """Tokens of which one alike ends their sequence, `OFTEN` or more, all but the first with loss.

    And (B, T) int64: where the run that each token is of begins.
    """
    ids, attended = view.input_ids, view.attended
    columns = torch.arange(ids.shape[1]).expand(ids.shape)
    same = attended & later(attended) & ~view.starts
    final = attended.clone()
    final[:, :-1] &= ~same[:, 1:]
    same[:, 1:] &= ids[:, 1:] == ids[:, :-1]
    if not bool((final & same & view.scored).any()):
        return torch.zeros_like(attended), columns
    first = torch.where(same, -1, columns).cummax(1).values
    last = torch.full_like(first, ids.shape[1] - 1)
    last[:, :-1] = torch.where(same, ids.shape[1], columns).flip(1).cummin(1).values.flip(1)[:, 1:]
    last[:, :-1] -= 1
    count = view.scored.long().cumsum(1)
    whole = count.gather(1, last) - count.gather(1, first) == last - first
    return final.gather(1, last) & whole & (last - first + 1 >= OFTEN), first


def unscored_ends(view: View) -> Tensor:
    """Ends of a turn after a scored answer, without loss, and the white space before them."""
    if not view.eos:
        return torch.zeros_like(view.attended)
    ends, scored = is_end(view), view.scored
    free = ~scored & view.attended & ~view.starts
    scored = scored & ~shifted_twice(view)[:, None]  # whose answers stand elsewhere
    ended = scored & (ends | later(scored & ends))  # a template may write one token more
    answered = scored & ~ended
    at = later(answered) & free
    if not bool(at.any()):
        return at
    turn = roles(view)
    if turn is not None:  # what is scored of others' turns is no answer
        at &= later(answered & (_of(view, turn, "assistant") | (turn == 0)))
    found = at & ends
    for steps in range(1, BLANKS + 1):
        at = later(at & _blank(view, at & ~ends)) & free
        if not bool(at.any()):
            break
        end = at & ends
        for back in range(steps + 1):
            found[:, : end.shape[1] - back] |= end[:, back:]
    return found


def near(view: View, ends: Tensor) -> Tensor:
    """Ends, and what a template writes behind one: a token, white space after it."""
    at = later(ends) & ~view.starts
    return ends | at | later(at & _blank(view, at)) & ~view.starts


def is_end(view: View) -> Tensor:
    """Tokens that end a text or a turn."""
    ends = torch.tensor(sorted(view.eos), dtype=view.input_ids.dtype)
    return torch.isin(view.input_ids, ends)


def _blank(view: View, among: Tensor) -> Tensor:
    """White space, among some tokens."""
    ids = view.input_ids[among].unique().tolist() if bool(among.any()) else []
    blank = [token for token in ids if is_blank(view.tokenizer, token)]
    return among & torch.isin(view.input_ids, torch.tensor(blank, dtype=view.input_ids.dtype))


def roles(view: View) -> Tensor | None:
    """(B, T) int64: the number of the header in `view.turns` that a token stands after, from 1.

    0 where none does; None where the chat template says too little.
    """
    begun = _headers(view)
    return begun.gather(1, _since(view, begun)) if begun is not None else None


def _headers(view: View) -> Tensor | None:
    """(B, T) int64: the number of the header that begins at a token; 0 where none does."""
    headers = view.turns.headers
    if not headers:
        return None
    ids, T = view.input_ids, view.input_ids.shape[1]
    begun = torch.zeros_like(ids)
    order = sorted(range(len(headers)), key=lambda n: len(headers[n][1]))  # longer ones win
    for number in order:
        header = headers[number][1]
        n = len(header)
        if n > T:
            continue
        here = view.attended[:, : T - n + 1].clone()
        for offset, token in enumerate(header):
            here &= ids[:, offset : T - n + 1 + offset] == token
        begun[:, : T - n + 1][here] = number + 1
    return begun


def _since(view: View, begun: Tensor) -> Tensor:
    """(B, T) int64: where the message or the sequence that a token belongs to begins."""
    reset = (begun > 0) | view.starts
    return torch.where(reset, torch.arange(reset.shape[1]), 0).cummax(1).values


def unended(view: View) -> Tensor:
    """Last tokens with loss of answers that another's turn follows, without an end between."""
    found = torch.zeros_like(view.attended)
    begun = _headers(view)
    if begun is None or not view.eos:
        return found
    columns, since = torch.arange(begun.shape[1]), _since(view, begun)

    def last(mask: Tensor) -> Tensor:
        return torch.where(mask, columns, -1).cummax(1).values

    scored, end = last(view.scored & view.attended), is_end(view)
    ended = last(end & (scored >= since)) >= since
    open_ = _of(view, begun.gather(1, since), "assistant") & (scored >= since) & ~ended
    others = (begun > 0) & ~_of(view, begun, "assistant") & ~view.starts & ~end
    if not view.turns.calls_end:
        others &= ~_of(view, begun, "tool")
    for row, column in (open_[:, :-1] & others[:, 1:]).nonzero().tolist():
        if not _may_end(view, row, column):
            found[row, scored[row, column]] = True
    return found


def _may_end(view: View, row: int, column: int) -> bool:
    """Whether a message ends with a special token, which may be an end that no one names."""
    for token in view.input_ids[row, max(0, column - BLANKS) : column + 1].flip(0).tolist():
        if not is_blank(view.tokenizer, token):
            known = getattr(view.tokenizer, "all_special_ids", ())
            return token in known and not MARKS.search(text_of(view.tokenizer, token))
    return False


def _of(view: View, turn: Tensor, role: str) -> Tensor:
    numbers = [n for n, (known, _) in enumerate(view.turns.headers, 1) if known == role]
    return torch.isin(turn, torch.tensor(numbers))


def others_scored(view: View) -> dict[str, Tensor]:
    """By role: tokens with loss in turns that are not the assistant's; a stop token aside."""
    found = roles(view)
    if found is None:
        return {}
    scored = view.scored & view.attended & ~crossed(view)
    scored &= ~(later(scored) & is_end(view)) if view.eos else scored
    by_role: dict[str, Tensor] = {}
    for number, (role, _) in enumerate(view.turns.headers, 1):
        mask = scored & (found == number)
        if role != "assistant" and bool(mask.any()):
            by_role[role] = by_role[role] | mask if role in by_role else mask
    return by_role


def special_scored(view: View) -> Tensor:
    """Tokens with loss that are no part of an answer: begin of text, media, a turn's header."""
    ids = torch.tensor(sorted(view.special), dtype=view.input_ids.dtype)
    found = view.scored & view.attended & torch.isin(view.labels, ids) & ~crossed(view)
    turn = roles(view)
    if turn is not None and bool(found.any()):
        assistant = _of(view, turn, "assistant")
        header = torch.tensor([token for _, ids in view.turns.headers for token in ids])
        again = assistant & later(assistant & view.scored)  # it goes on with another message
        found &= ~(again & torch.isin(view.labels, header))
    return found


def doubled(view: View) -> Tensor:
    """The second of two begins of text that begin a sequence, or of two ends that end one.

    What is padding too (many of it, at an end), or both begin and end, is less surely so.
    """
    ids, found = view.input_ids, torch.zeros_like(view.attended)
    inside = view.attended & ~view.starts
    same = inside.clone()
    same[:, 1:] &= ids[:, 1:] == ids[:, :-1]
    pair, followed = same & ~later(same), torch.zeros_like(same)
    pair[:, :-1] &= ~same[:, 1:]
    followed[:, :-1] = inside[:, 1:]
    second = later(view.starts)
    if view.bos is not None and (view.bos in view.eos or view.bos == view.pad):
        found |= pair & (ids == view.bos) & second & followed
    elif view.bos is not None:
        found |= same & (ids == view.bos)
    for end in view.eos:
        here = pair & (ids == end) & ~second
        here &= view.scored | (end != view.pad if view.pad is not None else view.bos == end)
        found |= here & ~(followed & (end == view.bos))
        if end != view.bos:
            found |= same & view.scored & (ids == end) & ~second
    return found
