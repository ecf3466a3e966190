"""The package as a whole: its public names, what importing costs, its version."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import ssdir
from ssdir.cli.main import main
from ssdir.common.extras import how_to_install
from ssdir.detector.ssd import Detector
from ssdir.model.latents import Objects
from ssdir.model.ssdir import SSDIR

ROOT = Path(__file__).resolve().parents[1]


def test_the_public_names_are_these() -> None:
    models = {"SSDIR", "Detector", "Objects", "load_model"}
    work = {
        "generate",
        "preset",
        "train_detector",
        "train_ssdir",
        "train_baseline",
        "evaluate",
        "predict",
    }
    errors = {"UserError", "ConfigError", "DataError"}
    assert set(ssdir.__all__) == models | work | errors
    assert (ssdir.SSDIR, ssdir.Detector, ssdir.Objects) == (SSDIR, Detector, Objects)
    assert all(getattr(ssdir, name).__name__ == name for name in ssdir.__all__)
    assert set(ssdir.__all__) <= set(dir(ssdir))


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, ssdir\n"
        "assert 'SSDIR' in dir(ssdir)\n"
        "assert not {'torch', 'numpy', 'PIL', 'accelerate', 'rich', 'tyro'} & set(sys.modules)\n"
        "import ssdir.config, ssdir.common.errors\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ssdir' has no attribute 'SSDIRR'"):
        _ = ssdir.SSDIRR
    assert not hasattr(ssdir, "torch")


def test_the_version_is_told_in_one_place() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert ssdir.__version__ == declared == importlib.metadata.version("ssdir")
    assert f"\nversion: {declared}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_command_line_tells_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ssdir {ssdir.__version__}\n"


def test_everything_but_evaluation_works_without_the_extras(tmp_path: Path) -> None:
    script = """
import sys
for name in ("sklearn", "scipy", "matplotlib", "faster_coco_eval", "pycocotools", "tensorboard", "wandb"):
    sys.modules[name] = None  # as if it were not installed
from ssdir.cli import main as cli
from ssdir.cli import info
from ssdir.inference import predict as predictor
from ssdir.cli import quickstart
from ssdir.report import html as report
from ssdir.training import teaching
from ssdir.training import start as train
sys.exit(cli.main(sys.argv[1:]))
"""
    out = str(tmp_path / "data")
    words = f"data mnist-scenes quickstart --out {out} --n-train 2 --n-val 0 --n-test 1 --workers 1".split()
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 scenes" in done.stdout


def test_a_missing_extra_is_told_in_a_line_and_other_modules_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: BaseException) -> Callable[..., None]:
        def work(*_: object, **__: object) -> None:
            raise error

        return work

    told = ModuleNotFoundError(f"tracking needs wandb: {how_to_install('track')}")
    monkeypatch.setattr("ssdir.cli.info.print_environment", fail(told))
    assert main(["info"]) == 1
    assert capsys.readouterr().err == f"error: {told}\n"
    monkeypatch.setattr("ssdir.cli.info.print_environment", fail(ModuleNotFoundError("No module named 'x'")))
    with pytest.raises(ModuleNotFoundError, match="'x'"):
        main(["info"])
    monkeypatch.setattr("ssdir.cli.info.print_environment", fail(KeyboardInterrupt()))
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_every_image_file_is_opened_with_its_formats() -> None:
    calls = [
        (file.name, call.lineno, {item.arg for item in call.keywords})
        for file in (ROOT / "src").rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Image.open"
    ]
    assert calls and all("formats" in given for _, _, given in calls), calls
