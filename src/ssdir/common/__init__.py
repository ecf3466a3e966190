"""Tools that every room uses: errors, files, progress, the machine, optional parts, randomness."""
