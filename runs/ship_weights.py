"""Turn a finished SSDIR run into the weights that ship in the package: half precision, one folder.

Usage: python runs/ship_weights.py RUN [src/ssdir/weights/digits]
"""

from __future__ import annotations

import sys
from pathlib import Path

from ssdir import SSDIR

run = Path(sys.argv[1])
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "src/ssdir/weights/digits")
model = SSDIR.from_pretrained(run).half()  # read back as float32
model.save_pretrained(folder)
size = sum(file.stat().st_size for file in folder.iterdir())
parameters = sum(parameter.numel() for parameter in model.parameters())
print(f"{folder}: {parameters:,} parameters, {size / 2**20:.1f} MiB")
