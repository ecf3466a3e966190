"""CLEVR: its geometry and scene files, conversion, and scenes rendered like it."""
