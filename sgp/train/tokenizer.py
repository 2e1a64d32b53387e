"""A byte-level BPE tokenizer trained on the standard library, and its cache."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

VOCABULARY = 32_768
PAD, END = "<|pad|>", "<|end|>"
_RECIPE = "1"  # count up when the training below changes: old cache files are then not read


def cache_folder() -> Path | None:
    """Return `$XDG_CACHE_HOME/sgp` or `~/.cache/sgp`; None where there is no home folder.

    Example:
        >>> cache_folder().name
        'sgp'
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():  # the specification says to ignore relative ones
        return Path(base, "sgp")
    try:
        return Path.home() / ".cache" / "sgp"
    except RuntimeError:
        return None


def load_or_train(
    texts: Sequence[str],
    *,
    size: int = VOCABULARY,
    folder: Path | None,
    say: Callable[[str], None] = lambda _: None,
) -> Any:
    """Return the `tokenizers.Tokenizer` for these texts, from the cache if it is there.

    The cache file is named by Python version, vocabulary size and a hash of the texts, and is
    written to a temporary file first, so two runs cannot break one another. A file that cannot be
    used is rebuilt, a folder that cannot be written is done without; both are said.

    Args:
        texts: What to train on.
        size: Tokens wanted, the 256 bytes and 2 special tokens included; a small text gives fewer.
        folder: Where the cache is; None for no cache.
        say: Called with what happened, one sentence at a time.

    Example:
        >>> tokenizer = load_or_train(["def f(): pass"], size=300, folder=None)
        >>> tokenizer.decode(tokenizer.encode("def f").ids)
        'def f'
    """
    path = None if folder is None else folder / _cache_name(texts, size)
    if path is not None and path.exists():
        tokenizer = _load(path)
        if tokenizer is not None:
            say(f"tokenizer: {tokenizer.get_vocab_size()} tokens, from {path}")
            return tokenizer
        say(f"tokenizer: {path} is damaged; it is built again")
    tokenizer = _train(texts, size)
    saved = "not cached"
    if path is not None:
        try:
            _save(tokenizer, path)
            saved = f"cached in {path}"
        except OSError as error:
            saved = f"not cached: {error}"
    say(f"tokenizer: {tokenizer.get_vocab_size()} tokens, trained now, {saved}")
    return tokenizer


def wrap(tokenizer: Any) -> Any:
    """Return the tokenizer as the `transformers` class that is saved beside a model."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  # slow import

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD
    )


def _cache_name(texts: Sequence[str], size: int) -> str:
    content = hashlib.sha256(_RECIPE.encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        content.update(len(data).to_bytes(8, "little"))
        content.update(data)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"stdlib-bpe-py{version}-{size}-{content.hexdigest()[:16]}.json"


def _train(texts: Sequence[str], size: int) -> Any:
    from tokenizers import (  # noqa: PLC0415  # optional package
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _load(path: Path) -> Any | None:
    from tokenizers import Tokenizer  # noqa: PLC0415  # optional package

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001  # `tokenizers` raises plain Exception on a damaged file
        return None
    ids = [tokenizer.token_to_id(token) for token in (PAD, END)]
    return tokenizer if ids == [0, 1] else None


def _save(tokenizer: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(tokenizer.to_str())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
