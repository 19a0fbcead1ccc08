"""Processes that have the libraries in memory when they start: forked, where that can be done, from one server that imported them."""
import importlib
import multiprocessing
import os
import socket
import sys

context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux": context.set_forkserver_preload(["sdxl_course.dreambooth"])


def command(module, words, env, path):
    "Carry out a module's command in this process; all that it prints goes to a file."
    os.environ.update(env)
    with open(path, "w", encoding="utf-8", buffering=1) as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
        code = importlib.import_module(module).main(words)
        for stream in (sys.stdout, sys.stderr): stream.flush()
    sys.exit(code)


def run_ranks(module, words, folder, count=2, **more):
    "Run a module's command in several processes that find each other, as torchrun lets them; gives the exit codes and what each of them printed; `more` are environment variables."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS=1, **more)
    paths = [folder/f"rank-{rank}.txt" for rank in range(count)]
    environments = [{name: str(value) for name, value in dict(shared, RANK=rank, LOCAL_RANK=rank).items()} for rank in range(count)]
    runs = [context.Process(target=command, args=(module, words, env, path)) for env, path in zip(environments, paths)]
    for run in runs: run.start()
    for run in runs: run.join(300)
    return [run.exitcode for run in runs], [path.read_text(encoding="utf-8") for path in paths]
