"""The SSD detector: backbone, priors, heads, matching and multibox loss."""
