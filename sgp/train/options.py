"""The arguments of a run."""

from dataclasses import dataclass
from pathlib import Path

from sgp.train.model import HIDDEN
from sgp.train.tokenizer import VOCABULARY


@dataclass(frozen=True)
class Options:
    """The arguments of `sgp train`; None means that the run chooses.

    Attributes:
        data: JSON lines of prompt and completion; None is the Python standard library.
        model: A folder or a hub name; None is a tiny Llama with random weights.
        steps: Optimizer steps.
        batch_size: Sequences a step.
        seed: Of the weights and of the order of the data; the held-out pairs do not depend on it.
        out: Folder for the model, `loss.png` and `summary.json`; these are overwritten.
        max_length: Window in tokens, context and output; None: 128, or less if the model has less.
        lr: Largest learning rate; None: 4e-3 for the tiny Llama, 5e-5 for a given model.
        vocabulary: Size of the tokenizer trained on the standard library.
        hidden: Width D of the tiny Llama.
        loss: "pytorch", "sgp" or "sgp-linear": of the model that is saved; PyTorch's is trained
            beside it.
        library: Folder read in place of the standard library's.
    """

    data: Path | None = None
    model: str | None = None
    steps: int = 60
    batch_size: int = 4
    seed: int = 0
    out: Path = Path("sgp-out")
    max_length: int | None = None
    lr: float | None = None
    vocabulary: int = VOCABULARY
    hidden: int = HIDDEN
    library: Path | None = None
    loss: str = "sgp-linear"

    @property
    def learning_rate(self) -> float:
        """`lr`, or the default for the kind of model."""
        if self.lr is not None:
            return self.lr
        return 4e-3 if self.model is None else 5e-5
