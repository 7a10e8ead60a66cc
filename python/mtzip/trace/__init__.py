"""What can be shared: the graph of each network, its axes, and which layer of one answers to which of another."""
