"""Measuring models: detection, matching, probes, and the protocol that runs them all."""
