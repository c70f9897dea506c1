"""Train anew what `dpo_mini.runs` holds, and write dpo_mini/runs/NAME.json.

python tools/store_runs.py comparison makes the runs that chapter 09 shows. It takes minutes. Digits
differ between processors, which is why the results are stored.
"""

import argparse
import json
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

from dpo_mini import runs
from dpo_mini._files import write_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=runs.NAMES)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for name in parser.parse_args().names:
        made = import_module(f"dpo_mini.runs.{name}").make(progress=partial(tqdm, desc=name))
        text = json.dumps(made, indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_whole(Path(runs.__file__).with_name(f"{name}.json"), text.encode())


if __name__ == "__main__":
    main()
