"""Plots for papers, and boxes drawn on images."""
