"""Prints the lower bounds of a setup.cfg's requirements as constraints for pip: `torch>=2.11` as `torch==2.11`."""

import configparser
import re
import sys


def lower_bounds(path: str) -> list[str]:
    """One constraint for each requirement, extras included; extras that name others of the package itself add none."""
    parser = configparser.ConfigParser()
    parser.read(path)
    texts = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    itself = parser.get("metadata", "name", fallback=None)
    lines = {line.strip() for text in texts for line in text.splitlines() if line.strip()}
    lines = {line for line in lines if re.split(r"[^\w.-]", line)[0] != itself}
    found = {line: re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", line) for line in lines}
    if unbound := sorted(line for line, match in found.items() if match is None):
        raise SystemExit(f"{path}: these requirements have no lower bound: {', '.join(unbound)}")
    return sorted(f"{match[1]}=={match[2]}" for match in found.values() if match is not None)


if __name__ == "__main__":
    print("\n".join(lower_bounds(sys.argv[1])))
