"""Multi-scale scattered MNIST: digits, scenes, scenes on the fly."""
