"""Rows of logits: what belongs to one token, whatever makes the logits and whoever holds them.

`problem` checks what the caller passed, `recipe` has the constants of a loss, `operations` says who
computes rows (`by_torch`, `by_triton`; `backend` chooses), `operators` and `autograd` are how
PyTorch sees them (`watched`: when it has to), `reduction` and `divisor` make one number of many;
`top_k` has the few tokens of a row that a teacher's server returns.
"""
