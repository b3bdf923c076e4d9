"""Draw what a run did (loss, schedule, switches, modules, change of its weights), or several runs over each other."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotting.compare import compare
from plotting.modules import draw_modules
from plotting.run import Run
from plotting.single import draw_loss, draw_schedule, draw_switches
from plotting.spectrum import draw_spectrum, find_checkpoint

from megalowrank.errors import ConfigError, run_main


def draw(run: Run, checkpoint_path: Path | None, out: Path) -> None:
    """All pictures of one run; the change of its weights only if there is a checkpoint."""
    checkpoint = find_checkpoint(run, checkpoint_path)
    draw_loss(run, out)
    draw_schedule(run, out)
    draw_switches(run, out)
    draw_modules(run, out)
    if checkpoint is None:
        print("spectrum: the run has saved no checkpoint; name one with --checkpoint")
    else:
        draw_spectrum(run, checkpoint, out)


def main() -> None:
    """Command line of ``plot_run``."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, nargs="+", help="folder with run.json and metrics.jsonl; several compare")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint, or folder of them; default: --save of the run")
    parser.add_argument("--out", type=Path, help="folder of the images; default: the (first) run's folder")
    parser.add_argument("--x", choices=("updates", "tokens"), default="updates", help="horizontal axis of a comparison")
    args = parser.parse_args()
    runs, out = [Run.read(folder) for folder in args.run_dir], args.out or args.run_dir[0]
    if len(runs) == 1:
        draw(runs[0], args.checkpoint, out)
        return
    if args.checkpoint is not None:
        raise ConfigError("--checkpoint belongs to one run", f"{len(runs)} runs")
    compare(runs, args.x, out)


if __name__ == "__main__":
    run_main(main)
