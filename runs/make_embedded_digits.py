"""Make the digits inside the package: the first 600 training and 100 test digits of each class of MNIST.

python runs/make_embedded_digits.py FOLDER_OF_IDX_FILES [src/ssdir/data/mnist/embedded]

The digits of a split keep MNIST's own order.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from ssdir.data.mnist.digits import load_digits, write_idx

PER_CLASS = {"train": 600, "t10k": 100}


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for prefix, digits in zip(PER_CLASS, load_digits(source), strict=True):
        first = [np.flatnonzero(digits.labels == label)[: PER_CLASS[prefix]] for label in range(10)]
        chosen = np.sort(np.concatenate(first))
        write_idx(target / f"{prefix}-images-idx3-ubyte.gz", digits.images[chosen])
        write_idx(target / f"{prefix}-labels-idx1-ubyte.gz", digits.labels[chosen])


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "src/ssdir/data/mnist/embedded"))
