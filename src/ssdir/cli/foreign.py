"""Options that users of other tools type, and what they are called here."""

from __future__ import annotations

import re
from collections.abc import Sequence

_DETECTORS_SIDE = (
    "--detector.image-size N of ssdir train detector (SSDIR takes its detector's side, a baseline has "
    "--model.image-size)"
)
_TRAIN = {
    "epochs max-epochs num-epochs": "--training.steps N; an epoch is (images / training.batch-size) steps",
    "steps max-steps iterations iters max-iter max-iters": "--training.steps N",
    "batch batch-size bs train-batch-size": "--training.batch-size N",
    "lr lr0 learning-rate base-lr": "--training.learning-rate X",
    "imgsz img-size imagesz image-size img input-size resolution": _DETECTORS_SIDE,
    "workers num-workers": "nothing: reading images takes one thread; OMP_NUM_THREADS=N sets the processor's threads",
    "patience early-stopping": "--training.steps N; a run never ends early; metrics.csv tells when it might",
    "weights pretrained": "--imagenet FILE (first weights of a detector) or --resume (go on with the run in --out)",
    "checkpoint ckpt resume-from load": "--resume --out RUN, which goes on with the run in that folder",
    "name project output output-dir save-dir work-dir exp run-dir": "--out RUN",
    "dataset data-dir data-path data-root dataset-dir root": "--data DIR",
    "optimizer momentum": "--training.betas A B and --training.weight-decay X of AdamW",
    "weight-decay wd": "--training.weight-decay X",
    "scheduler lr-scheduler cos-lr": "--training.schedule constant|cosine|one_cycle|halving",
    "warmup warmup-epochs warmup-steps": "--training.warmup-steps N",
    "clip grad-clip clip-grad max-grad-norm": "--training.clip-norm X",
    "accumulate grad-accum gradient-accumulation-steps": "--training.accumulate N",
    "ema ema-decay": "--training.ema-decay X",
    "seed": "--training.seed N",
    "amp fp16 half bf16 precision": "--training.precision auto|fp32|bf16",
    "gpu gpus cuda": "--device cuda:0",
    "cfg config preset": "the preset's name as a word: ssdir train KIND PRESET",
    "conf conf-thres threshold score-threshold": "--model.present-threshold X",
    "save-period save-every save-interval": "--training.checkpoint-every N",
    "eval-every val-interval eval-interval": "--training.validate-every N",
    "log-interval log-every": "--training.log-every N",
    "wandb tensorboard logger": "--track wandb or --track tensorboard",
    "fliplr flip": "--augmentation.flip X",
}
_INFER = {
    "weights checkpoint ckpt": "--model RUN",
    "source input images": "the images as words: ssdir infer IMAGE_OR_FOLDER ... --out DIR",
    "conf conf-thres threshold score-threshold": "--present X",
    "name project output output-dir save-dir": "--out DIR",
    "gpu gpus cuda": "--device cuda:0",
}
_EVALUATE = {
    "weights checkpoint ckpt model": "the run as a word: ssdir evaluate RUN",
    "batch bs": "--batch-size N",
    "name project output output-dir save-dir": "--out DIR",
    "gpu gpus cuda": "--device cuda:0",
}
OURS = {
    command: {f"--{word}": answer for words, answer in table.items() for word in words.split()}
    for command, table in {"train": _TRAIN, "infer": _INFER, "evaluate": _EVALUATE}.items()
}
"""For each command: an option of other tools -> what to give here."""


def answer_foreign(arguments: Sequence[str]) -> str | None:
    """What to say of the first option that other tools have and we call otherwise; None where there is none.

    >>> answer_foreign("train detector small --data D --lr0 0.01".split())
    'there is no --lr0; give --training.learning-rate X'
    >>> answer_foreign("infer a.png --out o --device 0".split())
    "there is no device '0'; give --device cuda:0"
    """
    table = OURS.get(arguments[0], {}) if arguments else {}
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == "--device" and re.fullmatch(r"\d+(,\d+)*", number := value or following):
            if "," in number:
                processes = number.count(",") + 1
                return (
                    f"there is no device {number!r}; for several GPUs start processes: CUDA_VISIBLE_DEVICES={number} "
                    f"torchrun --nproc-per-node {processes} -m ssdir train ... (docs/cluster.md)"
                )
            return f"there is no device {number!r}; give --device cuda:{number}"
        if (answer := table.get(name.replace("_", "-"))) is not None:
            return f"there is no {name}; give {answer}"
    return None
