"""The linear head: hidden states to logits to rows, on the kept rows only, some at a time.

`problem` checks, `chunks` says how many rows at a time, `algorithm` is the loop over them with its
matmuls (`products`) and the row operations it is handed, `operators` and `autograd` are how PyTorch
sees it. `loss_function` calls a loss of the caller's own between the statistics of a chunk and its
gradient, and `mixing` finds one that would depend on the chunks.
"""
