"""Let mutmut run a sample of the mutants, or only name them: CONTRIBUTING.md, "Mutation testing".

python tools/sample_mutants.py 20 "dpo_mini/train/*.py"        # every 20th, from the first
python tools/sample_mutants.py 20 "dpo_mini/train/*.py" --first 11 --names

Files come in the order of their names and mutants in the order in which mutmut numbers them, so a
sample is the same wherever it is drawn.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name

ROOT = Path(__file__).parent.parent


def mutants(pattern: str) -> list[str]:
    """The names of all mutants of the files that match."""
    names = []
    for path in sorted(ROOT.glob(pattern)):
        mutated = mutate_file_contents(str(path), path.read_text(encoding="utf-8"), None, None)
        names += [get_mutant_name(path.relative_to(ROOT), name) for name in mutated.mutant_names]
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("every", type=int)
    parser.add_argument("patterns", nargs="+")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--names", action="store_true", help="print them, run nothing")
    asked = parser.parse_args()
    everything = [name for pattern in asked.patterns for name in mutants(pattern)]
    some = everything[asked.first - 1 :: asked.every]
    print(f"{len(some)} of {len(everything)} mutants", file=sys.stderr)
    if asked.names:
        print(*some, sep="\n")
    else:
        mutmut = Path(sys.executable).with_name("mutmut")
        sys.exit(subprocess.call([mutmut, "run", "--max-children", "1", *some], cwd=ROOT))
