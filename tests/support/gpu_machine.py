"""A machine with a GPU, whose driver is a stand-in and whose training runs on the CPU; for tests of whole runs."""

import json
import os

from support.nvml_stand_in import Script
from support.small_suite import pytest_in, without_page, write

QUICK = ("--mp-preset", "smoke", "--mp-seeds", "1", "--mp-start-method", "fork", "--mp-jit", "off")
FINE = "--mp-workloads=suite_workloads:fine"
"""A workload that takes half as long as mnist1d-mlp."""

CHANGE = """
import os, re
from pathlib import Path

PATH = Path(os.environ["MPSCALE_STAND_IN_NVML"])

def script(pattern, line):
    text = re.sub(pattern, line, PATH.read_text())
    fresh = PATH.with_name("suite.new")
    fresh.write_text(text)
    fresh.replace(PATH)

def worker(*steps):
    script("process compute @worker .*", "process compute @worker " + " ".join(steps))
"""


class Machine:
    """A machine with one GPU, and a suite to run on it. Pages of its runs are not drawn.

    Args:
        folder: where the suite and its results are.
        library: the folder of the stand-in.
    """

    def __init__(self, folder, library):
        self.folder, self.library = folder, library
        self.script = Script(folder / "nvml.txt")
        self.script.process("compute", "@worker", 300)

    def run(self, suite, *options, **variables):
        write(self.folder, test_suite=CHANGE + suite)
        environ = {"CUDA_VISIBLE_DEVICES": None, **self.script.environ(self.library), **variables}
        return pytest_in(self.folder, "--mp-workloads=mnist1d-mlp", *options, **without_page(**environ))

    def path(self):
        (path,) = (self.folder / "results" / "runs").iterdir()
        return path

    def events(self, name):
        lines = (self.path() / "journal.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]


CUSTOMIZE = """
import importlib.abc, importlib.util, json, os, re, sys

NAMES = ("CUDA_VISIBLE_DEVICES", "TF_GPU_ALLOCATOR", "XLA_FLAGS")
"""
"""A sitecustomize.py that logs who is started with which environment. It may fail with TensorFlow's allocator."""

HOOK = """
def log(what):
    with open(os.environ["WATCH_LOG"], "a") as file:
        file.write(json.dumps([what, os.getppid(), *map(os.environ.get, NAMES)]) + "\\n")

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "mpscale.worker.device":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            log("import")
            constant, require = module.tf.constant, module.require

            def required(device):
                log("worker")
                file = re.search("dump_autotune_results_to='(.*?)'", os.environ.get("XLA_FLAGS", ""))
                if os.environ.get("SAVES") and file:
                    open(file[1], "w").write("results")
                require(device)

            def touched(*arguments, **options):
                if os.environ.get("PICKY") and os.environ.get("TF_GPU_ALLOCATOR") == "cuda_malloc_async":
                    os._exit(3)
                module.tf.constant = constant
                return constant(*arguments, **options)

            module.tf.constant, module.require = touched, required

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Hook())
"""
"""Logs environments: when ``mpscale.worker.device`` is imported, and when a worker is about to touch the GPU. If
``PICKY`` is set, a worker ends when it then touches it with the default allocator. If ``SAVES`` is set, it saves
autotuning results, as XLA does on a real GPU."""


class Watched:
    """The environments that the processes of a machine's runs have.

    Args:
        machine: where they run.
        code: goes into sitecustomize.py, above the hook that logs.
    """

    def __init__(self, machine, code=""):
        (machine.folder / "sitecustomize.py").write_text(CUSTOMIZE + code + HOOK)
        path = os.pathsep.join([str(machine.folder), os.environ.get("PYTHONPATH", "")])
        self._log = machine.folder / "watch.log"
        self.variables = {"PYTHONPATH": path, "WATCH_LOG": str(self._log)}

    def seen(self, what):
        """For each process that got there: its parent, and the values of ``NAMES``."""
        lines = map(json.loads, self._log.read_text().splitlines())
        return [(parent, *values) for name, parent, *values in lines if name == what]
