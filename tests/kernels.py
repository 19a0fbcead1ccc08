"""Kernels that start warm, so that all pages run within minutes.

A page needs torch, diffusers and what comes with them, which take longer to import than most pages take to run. `warm(env)` starts
one process that imports what the library imports from others, and nothing of the course. Each notebook is then run by a kernel of its
own, forked from that process. Where processes cannot be forked safely, plain kernels are used."""
import ast
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


@contextlib.contextmanager
def warm(env):
    "The command that starts a kernel for the environment `env`, good inside the block; None where plain kernels have to do."
    if sys.platform != "linux": yield None; return
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address = os.path.join(folder, "kernels")
        listener.bind(address)
        listener.listen()
        server = subprocess.Popen([sys.executable, __file__, "serve", str(listener.fileno()), *["keep"]*(not sys.dont_write_bytecode)], env=env,
                                  stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True)
        listener.close()
        try: yield [sys.executable, __file__, "start", address, "-f", "{connection_file}"]
        finally:
            server.stdin.close()  # tells it to end
            server.wait()


def import_libraries(package):
    "Carry out each import from outside that stands in the modules of a package."
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "level", 0): continue
            if (getattr(node, "module", None) or node.names[0].name).split(".")[0] == package.name: continue
            with contextlib.suppress(ImportError): exec(compile(ast.Module([node], []), str(path), "exec"), {})


def serve(number, keep=None):
    "Fork a kernel for everyone who connects, until standard input ends. keep: whether the bytecode of the libraries may be written."
    del sys.path[0]  # this folder, which a plain kernel does not have
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as a plain kernel sets it
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # a kernel ends with its parent
    forbidden, sys.dont_write_bytecode = sys.dont_write_bytecode, keep is None # of the course, whose modules may change within a second, none is kept
    from ipykernel import kernelapp
    import_libraries(Path(os.environ["PYTHONPATH"]) / "sdxl_course")
    sys.dont_write_bytecode = forbidden
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    with socket.socket(fileno=number) as listener:
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            with listener.accept()[0] as connection:
                if os.fork() == 0: listener.close(); become_kernel(connection, kernelapp)
    os._exit(0)  # cleaning up after all the libraries takes seconds


def become_kernel(connection, kernelapp):
    "Turn this process into the kernel that was asked for. It ends when the one who asked does."
    order = json.loads(connection.makefile().readline())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.argv = ["ipykernel_launcher", *order["words"]]
    threading.Thread(target=lambda: (connection.recv(1), os._exit(1)), daemon=True).start()
    try: kernelapp.launch_new_instance()
    finally: os._exit(0)


def start(address, *words):
    "Ask for a kernel, and stay for as long as it lives."
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent when a kernel is shut down; killing this process is enough
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        connection.sendall(json.dumps({"env": dict(os.environ), "folder": os.getcwd(), "words": words}).encode() + b"\n")
        connection.recv(1)


if __name__ == "__main__": serve(int(sys.argv[2]), *sys.argv[3:]) if sys.argv[1] == "serve" else start(*sys.argv[2:])
