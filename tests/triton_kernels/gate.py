"""The ahead-of-time gate with whichever Triton is imported: every kernel as its launcher would choose to compile it.

python tests/triton_kernels/gate.py                                     every case of every chip
python tests/triton_kernels/gate.py --chip sm_90 --few --tensor-cores   of one chip, a part as in `make test`
PYTHONPATH=.venv/triton-3.6.0 python tests/triton_kernels/gate.py       every case with another Triton

It asks for what no version of Triton may miss (`Case.problems`), not for the figures of the budgets, which are those of
one compiler. Each problem is a line; the exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import aot
from covering import cover
from report import OPS


def cases(op: str, chips: list[str], few: bool, each_config: bool, tensor_cores: bool) -> list[aot.Case]:
    """Those of an op; perhaps a few, in which each value of each field occurs, and perhaps each configuration."""
    module = importlib.import_module(f"test_{op}_aot")
    found: list[Any] = [c for c in [*module.cases(), *getattr(module, "others", list)()] if c.chip in chips]
    if tensor_cores:
        found = [case for case in found if case.kind != "ieee"]
    if not few:
        return found
    also = [_config(case) for case in found] if each_config else []
    return [found[i] for i in sorted(cover([astuple(case) for case in found], 1, also))]


def _config(case: aot.Case) -> object:
    try:
        return case.config
    except NotImplementedError:  # kernels without tiles have none
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=OPS, nargs="+", default=OPS)
    parser.add_argument("--chip", choices=aot.CHIPS, nargs="+", default=list(aot.CHIPS))
    parser.add_argument("--few", action="store_true", help="a part that covers the rest")
    parser.add_argument("--each-config", action="store_true", help="with --few: a part that has every configuration")
    parser.add_argument("--tensor-cores", action="store_true", help="without products in fp32")
    args = parser.parse_args()
    chosen = [
        (op, case) for op in args.kernel for case in cases(op, args.chip, args.few, args.each_config, args.tensor_cores)
    ]
    bad = 0
    for op, case in chosen:
        try:
            problems = case.problems()
        except Exception as error:  # compilers fail in several ways
            problems = [f"does not compile: {type(error).__name__}: {error}".splitlines()[0]]
        bad += bool(problems)
        for problem in problems:
            print(f"{op} {case}: {problem}", flush=True)
    print(f"{aot.compiler_version()}: {len(chosen)} kernels, {bad} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
