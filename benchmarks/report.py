"""What the benchmarks share: tables in Markdown, JSON, the marked sections of docs/benchmarks.md.

Imports neither numpy nor torch: a process that only starts others stays small.
"""
import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path


def parser(doc):
    """An ArgumentParser with --out and --write."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="JSON to write")
    p.add_argument("--write", type=Path, metavar="PAGE", help="replace the script's section of this page (docs/benchmarks.md)")
    return p


def parse(p, script):
    """Parse; exits with one line if --write names a page without a place for this script."""
    args = p.parse_args()
    if args.write and not args.write.is_file():
        p.error(f"{args.write} is not a page; give docs/benchmarks.md")
    if args.write:
        fill(args.write.read_text(), {script: ""})
    return args


def table(header, rows):
    """Markdown."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (header, ["---"] * len(header), *rows))


def targets(found):
    """Markdown of [(what, value, target, "x" or "%")]: ratios first, each with what it should reach. A value may be None."""
    def show(value, unit):
        return "not measured" if value is None else f"{value:.0%}" if unit == "%" else f"{value:.3g}x"

    def verdict(value, target):
        return "" if value is None or target is None else "met" if value >= target else "missed"

    return table(["ratio", "found", "target", ""], [[what, show(value, unit), "" if target is None else show(target, unit),
                                                     verdict(value, target)] for what, value, target, unit in found])


def machine(**more):
    """What the figures depend on, as one line."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    system = f"{cpu}, {os.cpu_count()} processors, {platform.system()}, Python {platform.python_version()}"
    return ", ".join([system, *(f"{key} {value}" for key, value in more.items())])


def fill(page, sections):
    """The text of a page with what stands between `<!-- NAME -->` and `<!-- end -->` replaced by sections[NAME], for each NAME.

    Exits with one line if a section has no place.
    """
    for name, text in sections.items():
        before, start, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            print(f"error: the page has no place for {name}; mark it by lines <!-- {name} --> and <!-- end -->", file=sys.stderr)
            sys.exit(2)
        page = f"{before}{start}{text}\n{end}{after}"
    return page


def write(path, page):
    """A page, by a rename."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page)
    temporary.replace(path)
    print(f"wrote {path}")


def run(*command):
    """Run a Python script in a process of its own; exits with its last line if it fails. Returns its last line of output."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).splitlines() or [f"exit code {done.returncode}"]
    if done.returncode:
        print(f"{Path(command[0]).name}: {lines[-1]}", file=sys.stderr)
        sys.exit(2)
    return lines[-1]


def finish(args, script, about, parts, rows):
    """Print the Markdown `parts`; write rows as JSON to --out, and into --write the command, the machine and the parts."""
    text = "\n\n".join(parts)
    print(f"{about}\n\n{text}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(dict(machine=about, rows=rows), indent=1))
        print(f"wrote {args.out}")
    if args.write:
        threads = os.environ.get("OMP_NUM_THREADS")
        words = [f"OMP_NUM_THREADS={threads}"] * bool(threads)
        words += ["python", f"benchmarks/{script}.py", *map(shlex.quote, sys.argv[1:])]
        section = f"```\n{' '.join(words)}\n```\n\n{about}\n\n{text}"
        write(args.write, fill(args.write.read_text(), {script: section}))
