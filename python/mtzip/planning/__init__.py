"""Which neurons to pair and how many to share, before anything is merged."""
