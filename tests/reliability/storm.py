"""Kill commands at random moments with SIGKILL, give them again, and compare with a run that nothing disturbed.

    python tests/reliability/storm.py --kills 100                       # make storm KILLS=100
    python tests/reliability/storm.py --kills 20 --only tune --seed 7

A round begins with nothing. The command is started, killed at a random moment, and given again until it ends by itself.
Then its folder must hold the same bytes as that of an undisturbed run (but for times of day and seconds; of a search:
exactly the trials that were asked for), nothing temporary beside them, and no lock that is held. Rounds go on until as
many kills have hit.

Commands run in forks of this process, which has everything imported: so a kill costs a second and not ten.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINING = (
    "--training.min-detected 0 --training.batch-size 4 --training.precision fp32 --training.log-every 2 "
    "--training.checkpoint-every 3 "
    "--training.validate-every 6"
)
MODEL = (
    "--model.z-what-size 4 --model.glimpse-size 8 --model.glimpse-width 4 --model.projector-size 8 "
    "--model.decoder-channels 8 8 8"
)
SCENES = (
    "data mnist-scenes quickstart --side 64 --digit-min 20 --digit-max 48 --n-train {} --n-val 4 --n-test 1 "
    "--seed {} --workers {} --out {}"
)
DETECTOR = f"train detector quickstart --detector.image-size 64 --detector.width 0.0625 {TRAINING}"
TRIALS = 3
_VOLATILE = {"seconds", "images_per_second"}
_LEFTOVERS = (".tmp", ".lock", ".old", ".making", ".part", "index.jsonl", "-journal", "-wal", "-shm")


@dataclass(frozen=True)
class Kind:
    """A command that is to survive."""

    commands: tuple[str, ...]
    """Its command lines, which make the folder ``out``; rounds take one after the other, and all make the same."""
    contents: Callable[[Path], Any]
    """What a folder made by it holds."""
    caches: tuple[str, ...] = ()
    """Folders that it fills on the way, emptied before each round."""


def contents_of(folder: Path) -> dict[str, Any]:
    """Every file below a folder, by its name; times are left out of those that tell them."""
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _content(path: Path) -> Any:
    if path.name == "metrics.csv":
        lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        kept = [i for i, name in enumerate(lines[0]) if name not in _VOLATILE]
        return [[line[i] for i in kept] for line in lines]
    if path.name == "training.json":
        return {name: item for name, item in json.loads(path.read_bytes()).items() if name not in _VOLATILE}
    if path.name in ("config.json", "run.json"):
        value = json.loads(path.read_bytes())
        value.get("data", {}).pop("folder", None)  # where the dataset lies
        value.pop("parts", None)  # and the models that the run stands on
        return value
    if path.name == "index.json":
        return sorted(json.loads(path.read_bytes()), key=lambda entry: entry["image"])
    return path.read_bytes()


def trials_of(folder: Path) -> Any:
    """Of a search, the number of finished trials and of those that never end."""
    from ssdir.search.database import existing_study

    states = [trial.state.name for trial in existing_study(None, folder, "tune").get_trials()]
    return {
        "finished": sum(state in ("COMPLETE", "PRUNED") for state in states),
        "open": sum(state in ("RUNNING", "WAITING") for state in states),
    }


KINDS = {
    "generation": Kind((SCENES.format(120, 1, 1, "out"), SCENES.format(120, 1, 2, "out")), contents_of),
    "detector": Kind(
        (f"{DETECTOR} --training.steps 20 --data scenes --out out --resume",), contents_of, ("scenes/.cache",)
    ),
    "ssdir": Kind(
        (
            f"train ssdir quickstart --data scenes --detector detector --out out --resume {MODEL} {TRAINING} "
            "--training.steps 12 --training.feature-cache disk",
        ),
        contents_of,
        ("scenes/.cache",),
    ),
    "tune": Kind(
        (
            f"tune quickstart --data scenes --detector detector --out out {MODEL} {TRAINING} --training.steps 6 "
            f"--trials {TRIALS} --objective image_mse --pruner none --sampler random --grace-period 2 "
            "--space objective.what=off model.z_what_size=2,4",
        ),
        trials_of,
    ),
    "conversion": Kind(("data convert many --to yolo --out out --workers 1",), contents_of),
    "inference": Kind(("infer pictures --model model --out out",), contents_of),
}


def prepare(kinds: list[str], do: Callable[[str], Any]) -> None:
    """In the current folder: what the commands start from; ``do`` runs a command."""
    needed = {"generation": 0, "conversion": 1, "inference": 3}
    stage = max(needed.get(kind, 2) for kind in kinds)
    if "conversion" in kinds:
        do(SCENES.format(120, 3, 1, "many"))
    if stage >= 2:
        do(SCENES.format(8, 2, 1, "scenes"))
        do(f"{DETECTOR} --training.steps 2 --data scenes --out detector")
    if stage >= 3:
        do(
            f"train ssdir quickstart --data scenes --detector detector --out model {MODEL} {TRAINING} "
            "--training.steps 2"
        )
        shutil.copytree("scenes/images/train", "pictures/train")
        shutil.copytree("scenes/images/val", "pictures/val")


def start(command: str) -> int:
    """Begin a command in a fork of this process; returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            from ssdir.cli.main import main

            with Path("log.txt").open("a", encoding="utf-8") as log:
                print(f"$ ssdir {command}", file=log, flush=True)
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            code = main(command.split())
            sys.stdout.flush()
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """The exit code of a process, when it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(command: str) -> float:
    """Run a command, which must succeed; returns the seconds."""
    began = time.monotonic()
    _require(wait(start(command)) == 0, f"ssdir {command}")
    return time.monotonic() - began


def _require(sound: bool, what: str) -> None:
    if not sound:
        end = (
            Path("log.txt").read_text(encoding="utf-8", errors="replace")[-3000:]
            if Path("log.txt").exists()
            else ""
        )
        raise SystemExit(f"FAILED: {what}\n{end}\n(everything is left in {Path.cwd()})")


def storm(name: str, kills: int, moments: random.Random) -> str:
    """Kill a kind of command so many times; returns a line about it.

    Raises:
        SystemExit: a command failed after a kill, or its result differs from that of an undisturbed run.
    """
    kind, out, began = KINDS[name], Path("out"), time.monotonic()
    _empty(out, kind)
    seconds = undisturbed = run(kind.commands[0])
    expected, usual = kind.contents(out), temporary_files()
    struck = rounds = 0
    while struck < kills:
        command = kind.commands[rounds % len(kind.commands)]
        _empty(out, kind)
        for attempt in itertools.count():
            started = time.monotonic()
            pid = start(command)
            if struck < kills:
                time.sleep(moments.uniform(0.0, 1.1 * seconds))
                os.kill(
                    pid, signal.SIGKILL
                )  # a process that has ended waits for us, so the number is still its own
            code = wait(pid)
            if code == 0:
                if attempt == 0:  # it came before the kill: the machine is quicker than it was
                    seconds = min(seconds, time.monotonic() - started)
                break
            _require(code == -signal.SIGKILL, f"ssdir {command} after {struck} kills: exit code {code}")
            struck += 1
        rounds += 1
        _compare(expected, kind.contents(out), name)
        more = temporary_files() - usual
        _require(not more, f"{name}: left over: {', '.join(sorted(map(str, more)))}")
        held = [path for path in Path().rglob("*.lock") if _is_held(path)]
        _require(not held, f"{name}: locks that are held: {', '.join(map(str, held))}")
    return (
        f"{name:<12}{struck:>6} kills{rounds:>5} rounds, each as an undisturbed run: {len(expected)} "
        f"{'numbers' if name == 'tune' else 'files'} equal, nothing left over "
        f"({time.monotonic() - began:.0f} s; undisturbed {undisturbed:.1f} s)"
    )


def temporary_files() -> set[Path]:
    """What is there for a while; of a search, its locks stay as empty files."""
    return {path for path in Path().rglob("*") if path.name.endswith(_LEFTOVERS)}


def _is_held(lock: Path) -> bool:
    """Whether a process holds a lock of the system on a file."""
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _empty(out: Path, kind: Kind) -> None:
    for folder in (out, *kind.caches):
        shutil.rmtree(folder, ignore_errors=True)


def _compare(expected: Any, found: Any, name: str) -> None:
    different = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    _require(not different, f"{name}: differs from an undisturbed run in {', '.join(different)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="in all, the same number for each kind")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of commands")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()

    os.environ.update(CUDA_VISIBLE_DEVICES="", MPLBACKEND="Agg", OMP_NUM_THREADS="1")
    importlib.import_module("torch").set_num_threads(1)
    for slow in (
        "accelerate",
        "torch._dynamo",
        "optuna",
        "ssdir.cli.quickstart",
        "ssdir.training.start",
        "ssdir.search.tune",
    ):
        importlib.import_module(slow)
    home = Path(tempfile.mkdtemp(prefix="storm-"))
    os.chdir(home)
    prepare(asked.only, run)
    moments = random.Random(asked.seed)
    for name in asked.only:
        print(storm(name, -(-asked.kills // len(asked.only)), moments), flush=True)
    os.chdir("/")
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
