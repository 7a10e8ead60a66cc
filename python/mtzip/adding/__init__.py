"""A further task for a network that is zipped already, by second moments that were kept."""
