"""Digits, scenes, dataset folders and the batches that training sees."""
