"""Runs tests/gpu and prints how many passed; with `tiny`, on the CPU where there is no GPU."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]


def main(shapes: str) -> int:
    """Run them; the exit code is pytest's."""
    import torch

    on_cpu = shapes == "tiny" and not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", "tests/gpu", "-q", "-m", "gpu", "-p", "no:cacheprovider",
                "-o", "filterwarnings=default", f"--junitxml={report}",
            ],
            cwd=ROOT, env={**os.environ, **({"HAORI_GPU_TESTS_ON": "cpu"} if on_cpu else {})}, check=False,
        )  # fmt: skip
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.is_file() else None
    if suite is None:
        print("pytest left no report")
        return 1
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{test.get('classname')}::{test.get('name')}"
        for test in suite.iter("testcase")
        if test.find("failure") is not None or test.find("error") is not None
    ]
    print(json.dumps({**counts, "failed_tests": failed, "device": "cpu" if on_cpu else "cuda"}))
    return done.returncode if counts["tests"] > counts["skipped"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
