"""What a divergence of two distributions is made of, apart from their logits."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

from sgp.rows.recipe import LARGEST, Recipe, shown

KINDS = ("forward_kl", "reverse_kl", "jsd")
# Numbers a row that a backward or the other ranks need: maximum and sum without one maximal column
# of the student's scores, of the teacher's, of the student's at temperature 1; what the teacher's
# sum has more; the teacher's score in the student's maximal column; what the gradient subtracts
# (before it is known, a KL's running sum); the sum for the entropy.
SAVED = 10


class Divergence(NamedTuple):
    """How a student is compared with a teacher; the rest is in the student's Recipe."""

    kind: str = ""  # one of KINDS; "": with none
    beta: float = 0.5
    cross_entropy_weight: float = 0.0
    teacher_softcap: float | None = None
    teacher_logit_scale: float = 1.0

    def check(self, name: str) -> Divergence:
        """Itself, with floats for other real numbers.

        Raises:
            ValueError, TypeError: where a constant has no meaning.
        """
        if self.kind not in KINDS:
            raise ValueError(f"{name}: divergence = {self.kind!r}; expected one of {KINDS}")
        for label in ("beta", "cross_entropy_weight"):
            value = getattr(self, label)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name}: {label} = {shown(value)}; expected a number")
            if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
                raise ValueError(f"{name}: {label} is too large for a float")
        if self.kind == "jsd" and not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"{name}: beta = {self.beta}; expected a number between 0 and 1, the teacher's "
                "share of the mixture of a 'jsd'. At 0 and 1 that is 0 for any two models: use "
                "divergence='forward_kl' or 'reverse_kl'"
            )
        if self.kind != "jsd" and self.beta != Divergence().beta:
            raise ValueError(
                f"{name}: beta = {self.beta} is of divergence='jsd' alone, and divergence is "
                f"{self.kind!r}; pass divergence='jsd', or leave beta out"
            )
        if not 0.0 <= self.cross_entropy_weight < math.inf:
            raise ValueError(
                f"{name}: cross_entropy_weight = {self.cross_entropy_weight}; expected a finite "
                "number of at least 0"
            )
        theirs = Recipe(softcap=self.teacher_softcap, logit_scale=self.teacher_logit_scale)
        try:
            theirs = theirs.check(name)
        except (TypeError, ValueError) as error:
            words = str(error).replace("softcap", "teacher_softcap")
            raise type(error)(words.replace("logit_scale", "teacher_logit_scale")) from None
        return Divergence(
            self.kind,
            float(self.beta),
            float(self.cross_entropy_weight),
            theirs.softcap,
            theirs.logit_scale,
        )

    def is_on(self) -> bool:
        """Whether there is a teacher."""
        return self.kind != ""

    def needs_label(self, *, stats: bool) -> bool:
        """Whether it matters which class a target is."""
        return stats or self.cross_entropy_weight > 0

    def of_teacher(self, recipe: Recipe) -> Recipe:
        """The teacher's recipe beside the student's."""
        return Recipe(
            recipe.ignore_index,
            softcap=self.teacher_softcap,
            logit_scale=self.teacher_logit_scale,
            temperature=recipe.temperature,
        )

    def largest_gradient(self, temperature: float) -> float:
        """About the largest that a student's logit gets.

        That of a reverse KL grows with the logarithm of a teacher's small probability: up to
        float16's range for one of exp(-65504), of a masked class. Of a mixture it is that of its
        least share.
        """
        if self.kind == "reverse_kl":
            return 4096.0 / temperature**2  # whose logarithm is divided too
        of_score = 1.0 - math.log(min(self.beta, 1 - self.beta)) if self.kind == "jsd" else 1.0
        return of_score / temperature

    def of_student(self, recipe: Recipe) -> tuple[Recipe, bool]:
        """Its recipe at temperature 1; whether the cross-entropy needs sums of its own for that."""
        at_one = recipe._replace(temperature=1.0)
        return at_one, self.cross_entropy_weight > 0 and recipe.temperature != 1.0
