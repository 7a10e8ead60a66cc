"""Files of zipped networks."""
