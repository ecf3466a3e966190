"""Several models on the same images: metrics with intervals, tables and scenes."""
