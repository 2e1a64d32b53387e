"""From data sets to batches: `examples` are rows with roles, `collator` makes a batch of them."""
