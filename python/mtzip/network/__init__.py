"""The zipped network: its leaves, the layout of their blocks, the container."""
