"""The model that is trained, its linear head, and what follows the head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgp.huggingface import probe
from sgp.huggingface.patching import described, is_plain
from sgp.train.batch import Batch
from sgp.train.errors import UserError

# Small enough for 2 CPU cores, large enough to learn. A separate head learns more slowly: in 60
# steps most of its rows hardly move (held-out loss 6.20 against 6.12 with tied embeddings).
HIDDEN, LAYERS, HEADS = 96, 2, 4


class Parts(NamedTuple):
    """A causal language model, its head, and what it does with the head's output."""

    model: Any
    head: nn.Linear  # (D) -> (V)
    logit_scale: float = 1.0
    softcap: float | None = None  # logits = softcap(logit_scale * head(hidden))

    def logits(self, batch: Batch) -> Tensor:
        """Return the model's own logits: (B, T, V)."""
        logits: Tensor = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
        return logits

    def kept_logits(self, batch: Batch) -> Tensor:
        """Return the model's own logits of the rows that carry loss: (M, V)."""
        with self._before_head(lambda hidden: hidden.flatten(0, 1)[batch.selection.rows][None]):
            return self.logits(batch).squeeze(0)

    def hidden(self, batch: Batch) -> Tensor:
        """Return what the head reads: (B, T, D). The head itself runs on one row."""
        read: list[Tensor] = []

        def note(hidden: Tensor) -> Tensor:
            read.append(hidden)
            return hidden[:1, :1]

        with self._before_head(note):
            self.logits(batch)
        return read[0]

    @contextmanager
    def _before_head(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let the head read something else than the model gives it."""
        hook = self.head.register_forward_pre_hook(lambda _, arguments: (change(arguments[0]),))
        try:
            yield
        finally:
            hook.remove()


def tiny_llama(vocabulary: int, window: int, *, seed: int, hidden: int = HIDDEN) -> Any:
    """Build a small `LlamaForCausalLM` from its config, with random weights of this seed.

    Args:
        vocabulary: V, the size of the tokenizer's vocabulary.
        window: Longest sequence.
        seed: Of the weights; the caller's random state stays as it was.
        hidden: D, the width; a multiple of 8.

    Example:
        >>> tiny_llama(32_768, 128, seed=0).num_parameters()
        3385824
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  # slow import

    config: Any = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=window,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load(name: str, tokenizer: str | None = None) -> tuple[Any, Any]:
    """Load `(model, tokenizer)` in float32 from a folder or from the Hugging Face hub.

    Args:
        name: The model's folder or hub name.
        tokenizer: The tokenizer's, where it is another.

    Raises:
        UserError: There is no such model, or it is not a causal language model.

    Example:
        >>> load("./missing")
        Traceback (most recent call last):
        sgp.train.errors.UserError: --model ./missing: no such folder
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  # slow import

    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:  # no hub name looks like this
        raise UserError(f"--model {name}: no such folder")
    found = load_tokenizer(tokenizer or name, option="--tokenizer" if tokenizer else "--model")
    try:
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # every kind of error comes out of a foreign folder
        reason = " ".join(str(error).split())
        raise UserError(f"--model {name}: {type(error).__name__}: {reason[:300]}") from error
    return model, found


def load_tokenizer(name: str, *, option: str = "--tokenizer") -> Any:
    """Load a tokenizer from a folder or from the Hugging Face hub.

    Raises:
        UserError: There is none; names the option that asked for it.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415  # slow import

    try:
        return AutoTokenizer.from_pretrained(str(Path(name).expanduser()))
    except Exception as error:  # every kind of error comes out of a foreign folder
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{option} {name}: {type(error).__name__}: {reason}") from error


def save(parts: Parts, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer so that `AutoModelForCausalLM.from_pretrained(folder)` works."""
    with _no_bars():
        parts.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def split_model(model: Any) -> Parts:
    """Find the head, its scale and its softcap, or say why the model cannot be used.

    Every model is taken that `sgp.huggingface.patch` takes in mode "fused".

    Raises:
        UserError: The model has no linear head, or more than a scale and a softcap follows it.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not is_plain(head):
        kind = "none" if head is None else described(head)
        raise UserError(f"--model: {name} has no plain nn.Linear as its head (found: {kind})")
    try:
        found = probe.post_processing(model, head)
    except Exception as error:  # whatever a foreign model raises is the reason
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--model: {name} cannot be run on tokens alone: {reason}") from error
    if found is None:
        raise UserError(
            f"--model: {name} changes its logits after the head by more than a scale and a "
            "softcap; `sgp train` needs logits = softcap(scale * head(hidden))"
        )
    return Parts(model, head, found.logit_scale, found.softcap)


def post_processed(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Return softcap(logit_scale * logits), as the model has it."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@torch.no_grad()
def check_head(parts: Parts, batch: Batch) -> None:
    """Check that the model's own logits are those of its parts.

    Raises:
        UserError: The two differ, or a token is outside the vocabulary.
    """
    name = type(parts.model).__name__
    largest = int(batch.input_ids.max())
    if largest >= parts.head.out_features:
        raise UserError(
            f"--model: token {largest} is outside {name}'s vocabulary of "
            f"{parts.head.out_features}; is this the model's own tokenizer?"
        )
    logits = functional.linear(parts.hidden(batch), parts.head.weight, parts.head.bias)
    ours = post_processed(logits, parts.logit_scale, parts.softcap)
    own = parts.logits(batch)
    difference = float((ours - own).abs().max())
    if difference > 1e-3 * max(1.0, float(own.abs().max())):
        raise UserError(
            f"--model: {name}'s logits differ by up to {difference:.3g} from softcap(scale * "
            f"head(hidden)) with scale {parts.logit_scale:g} and softcap {parts.softcap}"
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the progress bars of `transformers`, which begin in the middle of our own output."""
    from transformers.utils import logging  # noqa: PLC0415  # slow import

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
