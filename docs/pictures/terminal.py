"""Runs what a newcomer runs and keeps each terminal as docs/img/terminal-*.svg.

`python docs/pictures/terminal.py [doctor verify bench example]`, from the environment that `make`
has made; all of it takes about five minutes on two CPU cores.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
WIDTH = 80
# Whoever runs this has folders of their own.
HIDDEN = {str(Path.home()): "~", str(ROOT): "."}

COMMANDS = {
    "doctor": ("padless doctor", ["-m", "padless", "doctor"]),
    "verify": ("padless verify", ["-m", "padless", "verify"]),
    "bench": ("padless bench", ["-m", "padless", "bench"]),
    "example": ("python examples/lora_peft.py", ["examples/lora_peft.py"]),
}


def main(names: list[str]) -> None:
    """Runs the commands of these names, or all, and writes a picture of each."""
    for name in names or COMMANDS:
        shown, arguments = COMMANDS[name]
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # progress
            text=True,
            check=True,
        )
        output = done.stdout
        for folder, sign in HIDDEN.items():
            output = output.replace(folder, sign)
        console = Console(width=WIDTH, record=True, file=io.StringIO(), force_terminal=True)
        console.print(Text(f"$ {shown}", style="bold"))
        console.print(Text.from_ansi(output.rstrip()))
        target = ROOT / "docs" / "img" / f"terminal-{name}.svg"
        console.save_svg(str(target), title="padless", unique_id=f"padless-{name}")
        print(target.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
