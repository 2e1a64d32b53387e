"""From data sets to batches.

`reading` has the rows of a file, `examples` tokens and labels of a row, `collator` makes a batch.
"""
