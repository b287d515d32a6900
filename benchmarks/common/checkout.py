"""What git says of this checkout."""

import subprocess
from pathlib import Path


def git(*arguments: str) -> str:
    """Its answer in ``benchmarks/``; "unknown" without git, or outside a checkout."""
    folder = Path(__file__).parents[1]
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
