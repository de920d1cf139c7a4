"""The command line: help without host libraries, exit codes, errors with hints."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from latentedge.runtime.cli import COMMANDS, describe, run

#: Modules that a device does not have; importing them is made to fail.
BLOCKED = ("torch", "onnx", "onnxscript", "diffusers", "transformers", "onnxruntime", "openvino", "matplotlib", "rich")


def test_help_of_every_command_needs_nothing_but_the_base_dependencies() -> None:
    program = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
from latentedge.runtime.cli import run
for arguments in [["--help"], *[[command, "--help"] for command in {list(COMMANDS)!r}]]:
    assert run(arguments, debug=True) == 0, arguments
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Draw pictures from BUNDLE" in done.stdout


def test_the_list_of_commands_loads_none_of_them() -> None:
    program = """
import sys
from latentedge.runtime.cli import run
assert run(["--help"], debug=True) == 0
print(sorted(name for name in sys.modules if name.startswith("latentedge.") or name in ("numpy", "PIL")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "numpy" not in done.stdout.splitlines()[-1]
    assert "generate_command" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing"], 2, "No such command"),
        (["generate"], 2, "Missing argument"),
        (["generate", "absent.bundle", "a cat"], 2, "no output"),
        (["generate", "absent.bundle", "a cat", "-o", "x.png"], 1, "is not a bundle"),
        (["generate", "absent.bundle", "-o", "x.png", "--seed", "a"], 2, "--seed takes numbers"),
        (["generate", "absent.bundle", "-o", "x.png", "--size", "axb"], 2, "--size takes 512"),
        (["generate", "absent.bundle", "-o", "x.png", "--from", "absent.png"], 2, "there is no picture"),
        (["inspect", "absent.bundle"], 1, "is not a bundle"),
        (["verify", "absent.bundle"], 1, "is not a bundle"),
    ],
)
def test_exit_codes_and_messages(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments, debug=False) == code
    assert message in capsys.readouterr().err


def test_a_missing_library_names_the_extra_that_brings_it() -> None:
    program = """
import sys
sys.modules["onnx"] = sys.modules["rich"] = None
from latentedge.runtime.cli import run
sys.exit(run(["calibrate", "x.bundle"], debug=False))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "which is not installed" in done.stderr
    assert "pip install 'latentedge[calibration]'" in done.stderr


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "hint: free space"),
        (PermissionError(errno.EACCES, "Permission denied", "plan"), "hint: see that its folder exists"),
    ],
)
def test_system_errors_have_hints(error: OSError, hint: str) -> None:
    paragraph, _, rest = describe(error).partition("\n\n")
    assert paragraph == str(error)
    assert rest.startswith(hint)
