"""A doctor for runs: names what looks wrong in a log, and the question that explains it.

    python -m dpo_mini.real.doctor OUT/metrics.csv
    python -m dpo_mini.real.doctor OUT/checkpoint-500/trainer_state.json

The first is a log of `train_dpo.py` or `csv_log`, the second one of `trl`; `OUT` will do.
"""

import argparse
import sys
from collections.abc import Sequence

from dpo_mini.real.symptoms import FEWEST, diagnose, is_short


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: prints the findings; 1 where there are any, 2 where no log is read."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo_mini.real.doctor", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("log", help="metrics.csv of train_dpo.py, or trainer_state.json of trl")
    path = parser.parse_args(arguments).log
    try:
        findings, short = diagnose(path), is_short(path)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for finding in findings:
        print(finding)
    if short:
        print(f"This log has fewer than {FEWEST} steps: too short to say that a run is well.")
    elif not findings:
        print("No symptom in these curves. Now read some answers: no curve shows what is written.")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
