"""Mining: rows get hard negatives from a miner model."""
