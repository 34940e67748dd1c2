"""What the benchmarks share: timing in turns, tables in Markdown, the marked sections of the pages in docs/.

Imports neither numpy nor torch: a process that only starts others stays small.
"""
import argparse
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def parser(doc):
    """An ArgumentParser with --out and --write."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="JSON to write")
    p.add_argument("--write", type=Path, metavar="PAGE", help="replace the section of this page (docs/benchmarks.md)")
    return p


def script(name):
    """A numbered script as a module, such as script("06_fewshot_metrics"), without running its main()."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words, **env):
    """`python WORDS` in the repository; raises its last words if it fails. Returns its last line of output."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return (done.stdout.splitlines() or [""])[-1]


def take_turns(calls, rounds):
    """{name: seconds in each round} of {name: function}, after one to warm up. In turns: other load slows all alike."""
    times = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i > 0:
                times[name].append(time.perf_counter() - start)
    return times


def faster(times, one, other):
    """How many times as fast one is as the other, as text: the median over the rounds."""
    if one not in times or other not in times:
        return "not installed"
    return f"{statistics.median(b / a for a, b in zip(times[one], times[other])):.2f}x"


def table(header, rows):
    """Markdown."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (header, ["---"] * len(header), *rows))


def fill(page, sections):
    """A page with what stands between `<!-- NAME -->` and `<!-- end -->` replaced by sections[NAME], for each NAME."""
    for name, text in sections.items():
        before, start, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            sys.exit(f"error: the page has no place for {name}; mark it by lines <!-- {name} --> and <!-- end -->")
        page = f"{before}{start}{text}\n{end}{after}"
    return page


def write(path, page):
    """A page, by a rename."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page)
    temporary.replace(path)
    print(f"wrote {path}")


def finish(args, name, about, tables, rows):
    """Print the tables; write rows as JSON to --out, and command, machine and tables into --write."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    machine = f"{cpu}, {os.cpu_count()} processors, {platform.system()}, Python {platform.python_version()}, {about}"
    text = "\n\n".join([machine, *tables])
    print(text)
    if args.out:
        args.out.write_text(json.dumps(dict(machine=machine, rows=rows), indent=1))
    if args.write:
        threads = os.environ.get("OMP_NUM_THREADS")
        words = [f"OMP_NUM_THREADS={threads}"] * bool(threads)
        words += ["python", "-m", f"benchmarks.{name}", *map(shlex.quote, sys.argv[1:])]
        section = f"```\n{' '.join(words)}\n```\n\n{text}"
        write(args.write, fill(args.write.read_text(), {name: section}))
