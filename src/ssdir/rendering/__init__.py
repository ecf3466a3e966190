"""Rendering's registered operators and their implementations: plain PyTorch, compiled for the CPU, Triton for CUDA."""
