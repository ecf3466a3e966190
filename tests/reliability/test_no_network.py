"""No command opens a connection, a server or a look-up of names: every one, in every process that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.reliability.storm import DETECTOR, MODEL, SCENES, TRAINING

HOOK = '''
"""Imported by every Python process at its start: refuses the network, and notes that it was wanted."""
import os, socket, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        wanted = arguments[0].family in (socket.AF_INET, socket.AF_INET6)
    else:
        wanted = event.startswith("socket.getaddrinfo") or event.startswith("socket.gethostby")
    if wanted:
        with open(os.environ["NETWORK_LOG"], "a") as log:
            print(event, arguments[1:], file=log)
        raise RuntimeError(f"no network: {event} {arguments}")

sys.addaudithook(refuse)
'''
PROGRAM = """
import sys
from ssdir.cli.main import main

for line in sys.stdin.read().splitlines():
    try:
        code = main(line.split())
    except SystemExit as end:
        code = end.code
    print(f"{code} ssdir {line}", flush=True)
"""
WORDS = [
    "", "quickstart", "data", "data mnist-scenes main", "data clevr", "data clevr-like", "data wider-face",
    "data convert", "data check", "data show", "train", "train detector quickstart",
    "train ssdir quickstart", "train space mnist", "train spair mnist", "train slot-attention clevr",
    "train crop-vae mnist", "tune quickstart", "ablate", "evaluate", "compare", "infer", "info",
]  # fmt: skip
TWO = f"{TRAINING} --training.steps 2"
COMMANDS = [
    *(f"{words} --help" for words in WORDS),
    "--version",
    "info",
    "info --preset quickstart",
    SCENES.format(8, 2, 2, "scenes"),
    "data check scenes",
    "data show scenes --out shown.png",
    "data convert scenes --to yolo --out yolo",
    f"{DETECTOR} --training.steps 2 --data scenes --out detector",
    f"train ssdir quickstart --data scenes --detector detector --out model {MODEL} {TWO}",
    "evaluate model --data scenes --out evaluation",
    "compare model detector --data scenes --out comparison --resamples 10",
    "infer scenes/images/train --model model --out found",
    f"tune quickstart --data scenes --detector detector --out study {MODEL} {TWO} --trials 1 --objective image_mse "
    "--pruner none --space objective.what=off",
]


def run(folder: Path, program: str, commands: str) -> tuple[list[str], str]:
    """The lines that a program prints, and what it wanted of the network."""
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    source = Path(__file__).parents[2] / "src"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "hook"), str(source)]),
        "NETWORK_LOG": str(folder / "network.txt"),
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "Agg",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], input=commands, env=environment, cwd=folder, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    log = folder / "network.txt"
    return done.stdout.splitlines(), log.read_text() if log.exists() else ""


def test_the_hook_refuses_the_network(tmp_path: Path) -> None:
    program = "import socket\nsocket.create_connection(('127.0.0.1', 9))"
    lines, wanted = run(tmp_path, program, "")
    assert "no network: socket." in lines[-1] and wanted.count("\n") == 1


def test_no_command_wants_the_network(tmp_path: Path) -> None:
    lines, wanted = run(tmp_path, PROGRAM, "\n".join(COMMANDS))
    ended = [line for line in lines if line[:1].isdigit() and " ssdir " in line]
    assert ended == [f"0 ssdir {line}" for line in COMMANDS], "\n".join(lines)
    assert wanted == ""
