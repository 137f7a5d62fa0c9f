"""Training: the contrastive loss, the large-batch step, and the trainer (paper, section 3.2)."""
