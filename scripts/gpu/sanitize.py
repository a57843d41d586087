#!/usr/bin/env python3
"""compute-sanitizer over every test of the kernels, a process for each test and tool; one Markdown table last.

Usage: python scripts/gpu/sanitize.py [--tests build/cuda/test_kernels] [--tools memcheck,initcheck,racecheck]
           [--only TEXT] [--jobs 12] [--limit 300] [--logs DIR]

memcheck looks into kiln's kernels alone, which saves it cuBLASLt's many; initcheck and racecheck need all of them, since
memory that a library wrote would look unwritten, and racecheck fails where it may not look. racecheck reports rings in
shared memory that are filled by bulk copies and guarded by mbarriers, in cuBLASLt's kernels as in kiln's; the table says
in which kernels each report lies.
"""

import argparse
import collections
import concurrent.futures
import pathlib
import re
import shutil
import subprocess
import sys
import time

SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
PLACE = re.compile(r"(?:Race reported between \w+ access at|=========     at) (?:void )?([\w:<>]+)")


def names(tests, only):
    for options in (["--list-test-names-only"], ["--list-tests", "--verbosity", "quiet"]):  # of Catch2 2, and of 3
        done = subprocess.run([tests, *options], capture_output=True, text=True)
        if "Unrecognised token" not in done.stdout + done.stderr:
            break
    listed = done.stdout
    found = [line.strip() for line in listed.splitlines() if line.strip() and only in line]
    if not found or listed.startswith("SKIPPED"):
        sys.exit(f"{tests}: no tests{' with ' + only if only else ''}; is there a GPU?\n{listed}")
    return found


def check(tool, name, arguments):
    """Seconds, what was reported, and in which kernels."""
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "100"]
    if tool == "memcheck":
        command += ["--kernel-name", "kns=kiln"]
    command += [arguments.tests, name.replace(",", "\\,")]
    begin = time.monotonic()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=arguments.limit)  # fmt: skip
        text, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as expired:
        text, code = (expired.stdout or b"").decode(errors="replace"), None
    if arguments.logs:
        file = pathlib.Path(arguments.logs) / f"{tool}.{re.sub(r'[^A-Za-z0-9]+', '_', name)[:80]}.txt"
        file.write_text(text)
    found = SUMMARY.findall(text)
    if code is None:
        result = "not ended"
    elif "No tests ran" in text:  # with which Catch2 2 ends as if all were well
        result = "no such test"
    elif not found or (code != 0 and found[-1] == "0"):
        result = f"failed, exit code {code}"
    else:
        result = found[-1]
    return time.monotonic() - begin, result, collections.Counter(PLACE.findall(text))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", default="build/cuda/test_kernels")
    parser.add_argument("--tools", default="memcheck,initcheck,racecheck")
    parser.add_argument("--only", default="", help="tests whose name holds this")
    parser.add_argument("--jobs", type=int, default=12, help="processes at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds of one test under one tool")
    parser.add_argument("--logs", default="", help="keep every output in this directory")
    arguments = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer: not found; it comes with the CUDA toolkit")
    if arguments.logs:
        pathlib.Path(arguments.logs).mkdir(parents=True, exist_ok=True)
    work = [(tool, name) for tool in arguments.tools.split(",") for name in names(arguments.tests, arguments.only)]
    rows = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for (tool, name), (seconds, result, places) in zip(work, pool.map(lambda w: check(*w, arguments), work)):
            print(f"{tool} {seconds:.0f} s: {result}: {name}", file=sys.stderr, flush=True)
            rows.append((tool, name, result, places))
    clean = collections.Counter(tool for tool, _, result, _ in rows if result == "0")
    print("| tool | tests | without a report |\n|-|-|-|")
    for tool in arguments.tools.split(","):
        print(f"| {tool} | {sum(row[0] == tool for row in rows)} | {clean[tool]} |")
    others = [row for row in rows if row[2] != "0"]
    if others:
        print("\n| tool | test | reports | in |\n|-|-|-|-|")
    for tool, name, result, places in others:
        where = ", ".join(f"{place} {count}" for place, count in places.most_common(3))
        print(f"| {tool} | {name} | {result} | {where or '-'} |")
    sys.exit(1 if others else 0)


if __name__ == "__main__":
    main()
