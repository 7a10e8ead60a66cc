"""The demonstration: two networks trained on real images, zipped at several share levels, retrained, and written down.

``mtzip demo`` runs it on scikit-learn's handwritten digits; ``mtzip demo --data DIR`` on MNIST and Fashion-MNIST.
The readers, networks and training loop serve the benchmarks and tests as well.
"""
