"""``python -m tests.simulation [--seed N] [--runs N] [--verbose]``: plays runs and says what was wrong with them."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from tests.simulation.play import play
from tests.simulation.schedule import schedule


def main() -> int:
    """Return 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first run's")
    parser.add_argument("--runs", type=int, default=1, help="how many, each with the seed that follows")
    parser.add_argument("--verbose", action="store_true", help="print everything that happens")
    asked = parser.parse_args()
    logging.disable()
    failed, changes, begun = 0, 0, time.process_time()
    for seed in range(asked.seed, asked.seed + asked.runs):
        outcome = play(schedule(seed))
        changes += outcome.changes
        if asked.verbose:
            print("\n".join(outcome.log))
        if asked.verbose or outcome.wrong:
            found = outcome.schedule
            policy = f"fence {found.fence}, {'automatic' if found.automatic else 'an operator decides'}, lease {found.lease_s:g} s"
            print(f"seed {seed}: {policy}; the writer changed {outcome.changes} times; at the end: {outcome.said}; {outcome.digest[:16]}")
        if outcome.wrong:
            failed += 1
            print("\n".join(f"  {sentence}" for sentence in outcome.wrong[:5]))
            print(f"  replay: python -m tests.simulation --seed {seed} --verbose")
    seconds = time.process_time() - begun
    print(f"{asked.runs} runs, {failed} of them wrong, {changes} changes of the writer, {seconds:.1f} s of processor time")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
