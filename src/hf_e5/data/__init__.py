"""Data: records become datasets, datasets become batches."""
