"""The model that is trained, split into a backbone and a linear head."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgp.train.batch import Batch
from sgp.train.errors import UserError

# Small enough for 2 CPU cores, large enough to learn. A separate head learns more slowly: in 60
# steps most of its rows hardly move (held-out loss 6.20 against 6.12 with tied embeddings).
HIDDEN, LAYERS, HEADS = 96, 2, 4


class Parts(NamedTuple):
    """A causal language model and its two halves."""

    model: Any
    backbone: Any  # input_ids (B, T) -> last_hidden_state (B, T, D)
    head: nn.Linear  # (D) -> (V)

    def hidden(self, batch: Batch) -> Tensor:
        """Return what the head reads: (B, T, D)."""
        output = self.backbone(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
        state: Tensor = output.last_hidden_state
        return state


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


def load(name: str) -> tuple[Any, Any]:
    """Load `(model, tokenizer)` in float32 from a folder or from the Hugging Face hub.

    Raises:
        UserError: There is no such model, or it is not a causal language model.

    Example:
        >>> load("./missing")
        Traceback (most recent call last):
        sgp.train.errors.UserError: --model ./missing: no such folder
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  # slow import

    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:  # no hub name looks like this
        raise UserError(f"--model {name}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # every kind of error comes out of a foreign folder
        reason = " ".join(str(error).split())
        raise UserError(f"--model {name}: {type(error).__name__}: {reason[:300]}") from error
    return model, tokenizer


def save(parts: Parts, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer so that `AutoModelForCausalLM.from_pretrained(folder)` works."""
    with _no_bars():
        parts.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def split_model(model: Any) -> Parts:
    """Find the backbone and the head, or say why the model cannot be used.

    Raises:
        UserError: The model has no linear head, or no backbone apart from it.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"--model: {name} has no linear head (found {type(head).__name__})")
    if model.base_model is model:
        raise UserError(f"--model: {name} has no backbone apart from its head")
    return Parts(model, model.base_model, head)


@torch.no_grad()
def check_head(parts: Parts, batch: Batch) -> None:
    """Check that the model's own logits are the head applied to the hidden states.

    A model that changes its logits afterwards (softcap, scale) would be trained on another loss
    than its own.

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
    ours = parts.head(parts.hidden(batch))
    own = parts.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    difference = float((ours - own).abs().max())
    if difference > 1e-3 * max(1.0, float(own.abs().max())):
        config = getattr(parts.model, "config", None)
        softcap = getattr(config, "final_logit_softcapping", None)
        cause = f"its config has final_logit_softcapping={softcap}" if softcap else "scale or cap?"
        raise UserError(
            f"--model: {name} changes its logits after the head (they differ by up to "
            f"{difference:.3g}; {cause}); `sgp train` needs logits = head(hidden)"
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
