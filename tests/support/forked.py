"""Programs that need a process each, in forks of one interpreter, because importing TensorFlow takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

_PARENT = """
import json, os, sys, tempfile, traceback

asked, found, names = json.load(sys.stdin), {}, {}
exec(asked["imports"], names)
for name, program in asked["programs"].items():
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 0
            try:
                exec(program, dict(names))
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found[name] = [code, *(file.seek(0) or file.read() for file in (out, err))]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Done:
    """How a program ended."""

    code: int
    stdout: str
    stderr: str


def run_forked(imports: str, programs: Mapping[str, str]) -> dict[str, Done]:
    """Run programs one after the other, each in a process in which ``imports`` have been made before.

    The imports must not make TensorFlow compute anything: its threads would be missing in the processes.
    """
    asked = json.dumps({"imports": imports, "programs": dict(programs)})
    command = [sys.executable, "-c", _PARENT]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {name: Done(*ended) for name, ended in json.loads(done.stdout.splitlines()[-1]).items()}
