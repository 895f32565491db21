"""Run a script of this repository in processes that have its slow imports behind them.

`python train.py` spends 8 to 15 s of a core on imports before its first line. run_script() forks
its processes from multiprocessing's fork server, which imports all of that once a session.
pytest-xdist's workers have one server together, which their parent starts before them.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ENV = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    # As many threads on one rank as on two: their numbers are compared.
    "OMP_NUM_THREADS": "1",
}

PRELOAD = [
    # What transformers imports only when a checkpoint is loaded.
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_vl.processing_qwen2_vl",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    "transformers.models.qwen2_vl.video_processing_qwen2_vl",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.tensorboard",
    "open_clip",
    "av",
    "scenedetect",
    "train",
    "prior",
    "evaluate",
    "visualize",
    "toy",
    "bench",
    "preloaded",
    # The parent's main module, which every child imports.
    "pytest",
]
multiprocessing.set_forkserver_preload(PRELOAD)


def keep_preload(names):
    """In place of set_forkserver_preload(): the list of a program under test is shorter."""


forkserver.set_forkserver_preload = keep_preload
ensure_running = forkserver._forkserver.ensure_running


def run_server():
    """In place of ensure_running(): the server finds preloaded.py."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests"), path]))
    ensure_running()
    if path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = path


forkserver._forkserver.ensure_running = run_server
forkserver.ensure_running = run_server


def do_nothing(*arguments, **options):
    pass


# Where the workers of pytest-xdist find the fork server: the process that started it, the
# descriptor that keeps it alive, its address.
SERVER = "VIDEOCFR_TEST_FORK_SERVER"


def start_server():
    """Start the fork server that the workers of pytest-xdist share."""
    server = forkserver._forkserver
    # Its processes that write to no file of a test write nothing.
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with open(os.devnull, "w") as nowhere:
        for descriptor in kept:
            os.dup2(nowhere.fileno(), descriptor)
    server.ensure_running()
    for descriptor, copy in kept.items():
        os.dup2(copy, descriptor)
        os.close(copy)
    words = [os.getpid(), server._forkserver_alive_fd, server._forkserver_address]
    os.environ[SERVER] = ":".join(map(str, words))


def join_server():
    """Use the fork server that the parent of this worker has started, if it has."""
    if SERVER not in os.environ or not Path("/proc/self/fd").exists():
        return
    starter, descriptor, address = os.environ.pop(SERVER).split(":")
    server = forkserver._forkserver
    server._forkserver_alive_fd = os.open(f"/proc/{starter}/fd/{descriptor}", os.O_WRONLY)
    server._forkserver_address = address
    server.ensure_running = do_nothing
    forkserver.ensure_running = do_nothing


def run_main(script, flags, env, output, errors, report):
    """Run a script as `python script flags` does, in this process.

    Args:
        output, errors: files that stdout and stderr go to.
        report: whether a run draws its report.html, which takes longer than two steps.
    """
    for descriptor, file in ((1, output), (2, errors)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(1)
    if not report:
        from common import run_page

        run_page.run_report = do_nothing
    # Worker processes come from the same fork server.
    forkserver._forkserver.ensure_running = do_nothing
    forkserver.ensure_running = do_nothing
    # As a user types it.
    name = os.path.relpath(script, ROOT)
    sys.argv = [name, *flags]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(name, run_name="__main__")
    finally:
        # A process of multiprocessing ends without them.
        atexit._run_exitfuncs()


class Script:
    """A script running on one or more ranks.

    Args:
        name: path, from the root of the repository.
        env: environment variables to set beside ENV.
        report: whether a run draws its report.html.
    """

    def __init__(self, name, *flags, ranks=1, env=None, report=True):
        self.flags = [str(flag) for flag in flags]
        self.name = name
        # Removed with this object.
        self.folder = tempfile.TemporaryDirectory(prefix="script-", ignore_cleanup_errors=True)
        self.output = Path(self.folder.name) / "stdout"
        self.errors = Path(self.folder.name) / "stderr"
        import torch

        # CUDA does not survive a fork.
        method = "spawn" if torch.cuda.is_available() else "forkserver"
        context = multiprocessing.get_context(method)
        env = {**ENV, **(env or {})}
        if ranks > 1:
            env["WORLD_SIZE"] = str(ranks)
            env["LOCAL_WORLD_SIZE"] = str(ranks)
            env["MASTER_ADDR"] = "127.0.0.1"
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                env["MASTER_PORT"] = str(free.getsockname()[1])
        self.processes = []
        for rank in range(ranks):
            if ranks > 1:
                env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (ROOT / name, self.flags, env, self.output, self.errors, report)
            process = context.Process(target=run_main, args=arguments)
            process.start()
            self.processes.append(process)

    def poll(self):
        """Exit code, or None while a rank runs. A failing rank ends the others, as launchers do."""
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        if failed and None in codes:
            self.signal("kill")
        if None in codes:
            return None
        return failed[0] if failed else 0

    def signal(self, name):
        """terminate or kill every rank."""
        for process in self.processes:
            getattr(process, name)()

    def wait(self, timeout=420):
        """Wait for the end.

        Returns:
            subprocess.CompletedProcess with the output of all ranks as text.
        Raises:
            subprocess.TimeoutExpired: the ranks were killed.
        """
        end = time.monotonic() + timeout
        try:
            code = self.poll()
            while code is None:
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(self.name, timeout)
                time.sleep(0.02)
                code = self.poll()
        finally:
            self.kill()
        command = [self.name, *self.flags]
        return subprocess.CompletedProcess(command, code, read(self.output), read(self.errors))

    def kill(self):
        self.signal("kill")
        for process in self.processes:
            process.join()


def read(file):
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def run_script(name, *flags, ranks=1, check=True, env=None, report=True, timeout=420):
    """Run a script to its end.

    Args:
        name: path, from the root of the repository.
        check: fail with the last output when the exit code is not 0.
        env: environment variables to set.
        report: whether a run draws its report.html.
    Returns:
        subprocess.CompletedProcess with the output of all ranks as text.
    """
    done = Script(name, *flags, ranks=ranks, env=env, report=report).wait(timeout)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done
