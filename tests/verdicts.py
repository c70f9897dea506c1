"""What every judge says of every known wrong answer and of every right one.

python -O tests/verdicts.py prints it as JSON: a test holds it against what is said without -O.
"""

import json
import runpy
import sys
from pathlib import Path

import torch
from test_homework import MISTAKES, TESTS, Attempt

from dpo_mini.checks import diagnose, museum

ROOT = Path(__file__).resolve().parent.parent


def verdicts() -> dict[str, list]:
    """Whether it passed, and the sentence, by the answer's place."""
    found = {}
    for kind, folder, name in (
        ("right", "notebooks/solutions", "SOLUTIONS"),
        ("wrong", "tests/mistakes", "MISTAKES"),
    ):
        for path in sorted((ROOT / folder).glob("*[0-9][0-9]*.py")):
            for number, answers in runpy.run_path(str(path))[name].items():
                for words, answer in answers.items() if kind == "wrong" else [("", answers)]:
                    found[f"{kind} {number} {words}"] = list(diagnose(number, answer))
    for test in TESTS:
        attempt = Attempt(test)
        for words, answer in {"": attempt.solution, **MISTAKES[test]}.items():
            for hidden_only in (False, True):
                sentence = attempt.judge(answer, hidden_only=hidden_only)
                kind = "wrong" if words else "right"
                found[f"{kind} {test} {words} {hidden_only}"] = [not sentence, sentence]
    solutions = ROOT / "notebooks/solutions/14_repair_the_museum_of_bugs.py"
    repairs = runpy.run_path(str(solutions))["REPAIRS"]
    for shown in museum.EXHIBITS:
        found[f"wrong {shown.name}"] = list(museum.diagnose(shown.name, shown.broken))
        found[f"right {shown.name}"] = list(museum.diagnose(shown.name, repairs[shown.name]))
    return found


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)  # as the sheets do
    json.dump(verdicts(), sys.stdout)
