"""`sgp train`: fine-tune a small causal language model with the sub-sequence loss.

One run trains two identical copies of a model on the same batches, one with PyTorch's loss over
all rows and one with sgp's over the rows that carry loss, and reports both side by side.

Example:
    $ sgp train --data pairs.jsonl --steps 200 --out run-1
"""
