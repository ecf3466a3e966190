"""Several models on the same images: what is compared, its figures with intervals, tables and scenes."""
