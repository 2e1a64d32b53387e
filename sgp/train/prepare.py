"""What a run starts from: data, tokenizer and model, with everything left out counted."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sgp.data.reading import Reading, alike
from sgp.train.batch import Encoded, Example, encode, encode_chats
from sgp.train.data import Chat, Pair, describe_skips, drop_duplicates, read_jsonl, split
from sgp.train.errors import UserError
from sgp.train.model import load, tiny_llama
from sgp.train.options import Options
from sgp.train.stdlib import source_files, stdlib_pairs
from sgp.train.tokenizer import cache_folder, load_or_train, wrap

_WINDOW = 128
CHAT = (  # of the tokenizer that is trained here, which has two special tokens
    "{% if tools %}tools: {{ tools | tojson }}{{ '\\n' }}{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] or '' }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Setup(NamedTuple):
    """Model, tokenizer, examples, and how many of the data became what."""

    model: Any
    tokenizer: Any
    train: list[Example]
    held_out: list[Example]
    counts: dict[str, int]


def prepare(options: Options, say: Callable[[str], None]) -> Setup:
    """Read the data, make or load tokenizer and model, encode, and split.

    Args:
        options: What to read and to build.
        say: Called with each thing worth knowing, one sentence at a time.

    Raises:
        UserError: The data or the model cannot be used.
    """
    library = [] if options.data and options.model else list(source_files(options.library))
    pairs, unusable = _read(options, library, say)
    if not library and not (options.data and options.model):
        raise UserError(
            "no Python source in the standard library's folder; give both --data and --model"
        )
    distinct = drop_duplicates(pairs)
    if options.model is None:
        texts = [text for _, text in library]
        trained = load_or_train(texts, size=options.vocabulary, folder=cache_folder(), say=say)
        tokenizer = wrap(trained)
        tokenizer.chat_template = CHAT
        window = options.max_length or _WINDOW
        model = tiny_llama(len(tokenizer), window, seed=options.seed, hidden=options.hidden)
    else:
        model, tokenizer = load(options.model)
        window = _window(options, model)
    chats = [item for item in distinct if isinstance(item, Chat)]
    if chats and not tokenizer.chat_template:
        raise UserError(
            f"--data {options.data} has chats ({chats[0].source}), and the tokenizer of --model "
            f"{options.model} has no chat template"
        )
    encoded = encode(
        [item for item in distinct if isinstance(item, Pair)],
        lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"],
        window=window,
        begin=tokenizer.bos_token_id,
        end=tokenizer.eos_token_id,
    )
    encoded = _joined(encoded, encode_chats(chats, tokenizer, window=window))
    for reason, sources in _by_reason(encoded.skips).items():
        say(f"data: {len(sources)} skipped: {reason} ({sources[0]})")
    counts = {
        "pairs": len(pairs),
        "unusable_lines": unusable,
        "identical": len(pairs) - len(distinct),
        "context_fills_window": encoded.filled,
        "without_tokens": encoded.empty,
        "completion_cut": encoded.cut,
        "chat_template_refuses": len(encoded.skips),
        "window": window,
    }
    _report(counts, pairs, say)
    if len(encoded.examples) < 2:
        raise UserError(_too_few(options, encoded, counts, pairs))
    train, held_out = split(encoded.examples, lambda example: example.digest)
    say(f"data: {_counted(len(train), pairs)} to train on, {len(held_out)} held out")
    counts |= {"train": len(train), "held_out": len(held_out)}
    return Setup(model, tokenizer, train, held_out, counts)


def _joined(pairs: Encoded, chats: Encoded) -> Encoded:
    return Encoded(
        pairs.examples + chats.examples,
        pairs.filled + chats.filled,
        pairs.cut + chats.cut,
        pairs.empty + chats.empty,
        chats.skips,
    )


def _by_reason(skips: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The sources of each reason; what differs in quotes only is one reason, told by the first."""
    found: dict[str, tuple[str, list[str]]] = {}
    for source, reason in skips:
        found.setdefault(alike(reason), (reason, []))[1].append(source)
    return dict(found.values())


def _counted(count: int, rows: Sequence[Pair | Chat]) -> str:
    """So many of such rows: pairs, chats, or rows where both are among them."""
    kinds = {"pair" if isinstance(row, Pair) else "chat" for row in rows}
    return f"{count} {kinds.pop() if len(kinds) == 1 else 'row'}{'s' * (count != 1)}"


def _read(
    options: Options, library: list[tuple[str, str]], say: Callable[[str], None]
) -> tuple[list[Pair | Chat], int]:
    if options.data is not None:
        pairs, skips = read_jsonl(options.data)
        say(f"data: {_counted(len(pairs), pairs)} from {Reading(options.data).shown}")
        for sentence in describe_skips(skips):
            say(f"data: {sentence}")
        return pairs, len(skips)
    functions = stdlib_pairs(library)
    say(f"data: {len(functions)} functions of the Python standard library")
    return [*functions], 0


def _window(options: Options, model: Any) -> int:
    most: int | None = getattr(model.config, "max_position_embeddings", None)
    if most is None:
        return options.max_length or _WINDOW
    if options.max_length is not None and options.max_length > most:
        raise UserError(
            f"--max-length {options.max_length} is more than the {most} positions of "
            f"--model {options.model}"
        )
    return options.max_length or min(_WINDOW, most)


def _report(
    counts: dict[str, int], rows: Sequence[Pair | Chat], say: Callable[[str], None]
) -> None:
    window = counts["window"]
    for key, sentence in (
        ("identical", "identical to an earlier one: dropped"),
        ("context_fills_window", f"with a context that fills the window of {window}: skipped"),
        ("without_tokens", "with a side that has no tokens: skipped"),
        ("completion_cut", f"with a completion that passes the window of {window}: cut there"),
    ):
        if counts[key]:
            say(f"data: {_counted(counts[key], rows)} {sentence}")


def _too_few(
    options: Options, encoded: Encoded, counts: dict[str, int], rows: Sequence[Pair | Chat]
) -> str:
    where = "the standard library" if options.data is None else f"--data {options.data}"
    remedy = f"; {encoded.skips[0][1]}" if encoded.skips else ""
    if encoded.filled:
        has = "has" if encoded.filled == 1 else "have"
        remedy = (
            f"; {encoded.filled} {has} a context that fills the window of {counts['window']} "
            "tokens: raise --max-length"
        )
    return (
        f"{where}: {len(encoded.examples)} usable of {_counted(counts['pairs'], rows)}, but one to "
        f"train on and one to hold out are needed{remedy}"
    )
