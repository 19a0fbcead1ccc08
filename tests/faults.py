"""Break a training run on purpose, at every moment if asked, and see whether anything is lost.

    python tests/faults.py                                          a few trials of every kind
    python tests/faults.py --kill 200 --write 100 --error 160 --damage 300 --hub 40 --save sdxl_course/studies/reliability.json
                                                                    the long campaign, half an hour

kill: the process dies before its k-th file operation; write: inside a write, after so many bytes; error: the k-th file operation
fails (disk full, input/output error, read-only); damage: a file of a finished run is removed, emptied, cut in half or has a bit
flipped; hub: the k-th answer of a hub is an error, silence, nonsense or half an answer. After each trial the same command is
given once more and must end with the bytes of a run that nothing happened to, or a sentence must say why it cannot. The model
has a few thousand random weights. Only where processes can be forked and limited: Linux and macOS."""
import argparse
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # a fork keeps no threads
sys.path.insert(0, str(Path(__file__).resolve().parent))
TOKEN = "hf_" + "Fault1nject10n" * 2
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
ERRORS = {"ENOSPC": True, "EIO": False, "EROFS": True}  # whether it stays so once it has begun
REMOVES = {"os.remove", "os.rmdir"}  # a full disk still lets go of files
HARMS = ("removed", "emptied", "halved", "a bit flipped")
ANSWERS = ("silence", "hung up", "nonsense", "half", 401, 403, 404, 409, 413, 429, 500, 503)


class Strike:
    "Count file operations below a folder by Python's audit events (PEP 578); at the k-th one something happens."
    def __init__(self, folder, moment, blow, stays=False, reads=False, spared=()):
        self.folder, self.moment, self.blow, self.stays, self.reads, self.spared, self.count = os.path.realpath(folder), moment, blow, stays, reads, spared, 0

    def __call__(self, event, given):
        if event == "open": counts = isinstance(given[0], (str, bytes)) and (self.reads or bool((given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        else: counts = event in CHANGES
        if not counts or not os.path.realpath(os.fsdecode(given[0])).startswith(self.folder): return
        self.count += 1
        if event not in self.spared and (self.count == self.moment or self.stays and self.count > self.moment): self.blow()


def die(): os.kill(os.getpid(), signal.SIGKILL)


def fail(name):
    number = getattr(errno, name)
    def blow(): raise OSError(number, os.strerror(number))
    return blow


def in_child(work, prepare=lambda: None):
    "Do some work in a process of its own: (exit code, what it printed); minus the signal where one ended it."
    with tempfile.TemporaryFile("w+", encoding="utf-8") as told:
        child = os.fork()
        if not child:
            code = 70
            try:
                os.dup2(told.fileno(), 1), os.dup2(told.fileno(), 2)
                prepare()
                code = work()
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.seek(0)
        return code, told.read()


class Bench:
    "A small run that can be repeated at will, and what it leaves where nothing happens to it."
    def __init__(self, home):
        from toy import make_pictures, make_toy_model
        from sdxl_course import text_to_image  # noqa: F401, imported before the forks
        self.home = Path(home)
        self.model, self.data = make_toy_model(self.home / "model"), make_pictures(self.home / "pictures", 4)
        self.whole = self.home / "whole"
        self.operations = {False: self.counted(self.whole, False), True: self.counted(self.home / "again", True)}  # with reads or without
        self.wanted = self.results(self.whole)

    def words(self, folder, updates=4):
        return ["--pretrained_model_name_or_path", str(self.model), "--train_data_dir", str(self.data), "--resolution", "64", "--max_train_steps", str(updates), "--train_batch_size", "2", "--seed", "0",
            "--learning_rate", "1e-2", "--report_to", "none", "--checkpointing_steps", "2", "--validation_prompt", "x", "--num_validation_images", "1", "--cache_dir", str(folder / "cache"), "--output_dir", str(folder)]

    def run(self, folder, *more, prepare=lambda: None, updates=4):
        from sdxl_course.text_to_image import main
        return in_child(lambda: main([*self.words(folder, updates), *more]), prepare)

    def counted(self, folder, reads):
        "How many file operations a whole run takes."
        watch = Strike(folder, 0, None, reads=reads)
        path = self.home / "count"
        def work():
            from sdxl_course.text_to_image import main
            sys.addaudithook(watch)
            code = main(self.words(folder))
            path.write_text(str(watch.count))
            return code
        code, told = in_child(work)
        assert code == 0, told
        return int(path.read_text())

    def results(self, folder):
        "The files that count: the LoRA, the log and the last checkpoint."
        names = [*folder.glob("pytorch_lora_weights*.safetensors"), folder / "training_log.jsonl", *(folder / "checkpoint-4").glob("*")]
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in names if path.is_file() and path.name != "manifest.json"}
        state = json.loads(found.get("checkpoint-4/trainer_state.json", "{}"))
        return found | {"checkpoint-4/trainer_state.json": state | dict(config=None)}  # it names the folder and how the run began

    def goes_on(self, folder):
        "Give the command once more: '' where it ends with the right bytes, else what is wrong."
        code, told = self.run(folder, "--resume_from_checkpoint", "latest")
        if code or "Traceback" in told: return f"the next run ended with {code}: {told[-300:]}"
        found = self.results(folder)
        if found != self.wanted: return f"other bytes: {sorted(name for name in self.wanted if found.get(name) != self.wanted[name])}"
        left = [path.name for path in folder.rglob(".*.part")]
        return f"halves of files are left: {left}" if left else ""


def spread(total, number, seed):
    "Some of the numbers 1 .. total, evenly spread and in order."
    if number >= total: return list(range(1, total + 1))
    g = random.Random(seed)
    return sorted({1 + int((k + g.random())*total/number) for k in range(number)})


def kills(bench, number):
    for moment in spread(bench.operations[False], number, "kill"):
        folder = bench.home / f"kill-{moment}"
        code, told = bench.run(folder, prepare=lambda: sys.addaudithook(Strike(folder, moment, die)))
        yield folder, f"before operation {moment}", bench.goes_on(folder) if code == -signal.SIGKILL else f"ended with {code}: {told[-300:]}"


def writes(bench, number):
    "The process dies inside the first write beyond so many bytes of one file."
    largest = max(path.stat().st_size for path in bench.whole.rglob("*") if path.is_file())
    for size in spread(largest - 1, number, "write"):
        folder = bench.home / f"write-{size}"
        def prepare():
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        code, told = bench.run(folder, prepare=prepare)
        yield folder, f"after {size} bytes", bench.goes_on(folder) if code == -signal.SIGXFSZ else f"ended with {code}: {told[-300:]}"


def errors(bench, number):
    for place, (name, stays) in enumerate(ERRORS.items()):
        reads = name == "EIO"
        for moment in spread(bench.operations[reads], (number + place) // len(ERRORS), name):
            folder = bench.home / f"{name}-{moment}"
            code, told = bench.run(folder, prepare=lambda: sys.addaudithook(Strike(folder, moment, fail(name), stays, reads, REMOVES if name == "ENOSPC" else ())))
            wrong = f"ended with {code}: {told[-300:]}" if code not in (0, 2) or "Traceback" in told else ""
            if code == 2 and "error:" not in told: wrong = f"no sentence: {told[-300:]}"
            yield folder, f"{name} at operation {moment}", wrong or bench.goes_on(folder)


def harm(path, how):
    data = path.read_bytes()
    if how == "removed": path.unlink()
    elif how == "emptied": path.write_bytes(b"")
    elif how == "halved": path.write_bytes(data[:len(data) // 2])
    else: path.write_bytes(data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1:])


def damages(bench, number):
    "Any file of a finished run; then the run is to go on to six updates, or a sentence says why not."
    code, told = bench.run(bench.home / "six", updates=6)
    assert code == 0, told
    wanted = bench.results(bench.home / "six")["pytorch_lora_weights.safetensors"]
    files = [path.relative_to(bench.whole) for path in sorted(bench.whole.rglob("*")) if path.is_file() and path.stat().st_size]
    trials = [(file, how) for file in files for how in HARMS]
    for k in spread(len(trials), number, "damage"):
        file, how = trials[k - 1]
        folder = bench.home / f"damage-{k}"
        shutil.copytree(bench.whole, folder)
        harm(folder / file, how)
        code, told = bench.run(folder, "--resume_from_checkpoint", "latest", updates=6)
        wrong = ""
        if code not in (0, 2) or "Traceback" in told: wrong = f"ended with {code}: {told[-300:]}"
        elif code == 2 and file.name not in told and file.parts[0] not in told: wrong = f"the file is not named: {told[-300:]}"
        elif code == 0 and (folder / "pytorch_lora_weights.safetensors").read_bytes() != wanted: wrong = "other bytes"
        yield folder, f"{file} {how}", wrong


class Hub(BaseHTTPRequestHandler):
    "As much of the hub as an upload needs; its k-th answer can be wrong."
    moment, answer, calls, files = 0, None, 0, ()

    def reply(self, value):
        Hub.calls += 1
        body = json.dumps(value).encode()
        wrong = Hub.answer if Hub.calls == Hub.moment else None
        if wrong == "silence": time.sleep(1.5); return
        if wrong == "hung up": self.connection.close(); return
        if wrong == "nonsense": body = b"<html>" + b"\xff" * 50
        self.send_response(wrong if isinstance(wrong, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) * (1 + (wrong == "half"))))
        self.end_headers()
        self.wfile.write(body)
        if wrong == "half": self.connection.close()

    def do_GET(self): self.reply(dict(id="me/run", sha="0" * 40, siblings=[], private=False, tags=[], downloads=0, likes=0))

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "preupload" in self.path: return self.reply(dict(files=[dict(path=one["path"], uploadMode="regular", shouldIgnore=False) for one in json.loads(data)["files"]]))
        if "commit" in self.path:
            lines = [json.loads(line) for line in data.splitlines() if line.strip()]
            Hub.files = sorted(line["value"]["path"] for line in lines if line["key"] == "file")
            return self.reply(dict(commitUrl=f"http://{self.headers['Host']}/me/run/commit/{'1' * 40}", commitOid="1" * 40, success=True))
        self.reply(dict(url=f"http://{self.headers['Host']}/me/run", id="me/run"))

    def log_message(self, *given): pass


def push(bench, moment, answer):
    "One push to a hub whose k-th answer is wrong: (exit code, words, calls, files that arrived)."
    def work():
        import threading
        import huggingface_hub.constants
        from huggingface_hub import HfApi
        import sdxl_course.train.hub as room
        Hub.moment, Hub.answer = moment, answer
        server = HTTPServer(("127.0.0.1", 0), Hub)
        server.handle_error = lambda *given: None  # nobody waits for a late answer
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        huggingface_hub.constants.HF_HUB_OFFLINE = False
        room.HfApi, room.PAUSES, room.SILENCE = lambda token=None: HfApi(endpoint=address, token=token), (0, 0), 0.5
        code = room.main([str(bench.whole), "--hub_model_id", "me/run", "--hub_token", TOKEN])
        (bench.home / "pushed.json").write_text(json.dumps([Hub.calls, Hub.files]))
        return code
    code, told = in_child(work)
    return code, told, *json.loads((bench.home / "pushed.json").read_text())


def hubs(bench, number):
    code, told, calls, files = push(bench, 0, None)
    assert code == 0 and "pytorch_lora_weights.safetensors" in files and not [name for name in files if "checkpoint" in name], told
    before = {path: path.read_bytes() for path in bench.whole.rglob("*") if path.is_file()}
    trials = [(moment, answer) for moment in range(1, calls + 1) for answer in ANSWERS]
    for k in spread(len(trials), number, "hub"):
        moment, answer = trials[k - 1]
        code, told, _, arrived = push(bench, moment, answer)
        wrong = ""
        if code not in (0, 2) or "Traceback" in told or TOKEN in told: wrong = f"ended with {code}: {told[-300:]}"
        elif code == 2 and "error:" not in told: wrong = f"no sentence: {told[-300:]}"
        elif code == 0 and list(arrived) != list(files): wrong = f"arrived: {arrived}"
        elif {path: path.read_bytes() for path in bench.whole.rglob("*") if path.is_file()} != before: wrong = "the folder is another"
        yield None, f"answer {moment} of {calls}: {answer}", wrong


KINDS = dict(kill=kills, write=writes, error=errors, damage=damages, hub=hubs)


def campaign(numbers, log=print, save=lambda found: None):
    "Trials of each kind: how many, what was lost, how long it took; told to `save` after each kind."
    found = {}
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(home)
        for kind, number in numbers.items():
            if not number: continue
            began, lost, trials = time.time(), [], 0
            for folder, what, wrong in KINDS[kind](bench, number):
                trials += 1
                if wrong: lost.append(f"{what}: {wrong}"); log(f"{kind} {lost[-1]}")
                if folder: shutil.rmtree(folder, ignore_errors=True)
            found[kind] = dict(trials=trials, lost=lost, seconds=round(time.time() - began))
            log(f"{kind}: {trials} trials, {len(lost)} lost, {found[kind]['seconds']} s")
            save(found)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS: parser.add_argument(f"--{kind}", type=int, default=3, help="trials, at most as many as there are moments")
    parser.add_argument("--save", help="JSON file for what was found; kinds without trials keep what it says")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from sdxl_course.devices import provenance
    path = Path(asked.save) if asked.save else None
    before = json.loads(path.read_text())["kinds"] if path and path.exists() else {}
    def save(found):
        if path: path.write_text(json.dumps(dict(kinds={**before, **found}, provenance=provenance()), indent=1) + "\n")
    found = campaign({kind: getattr(asked, kind) for kind in KINDS}, save=save)
    return int(any(one["lost"] for one in found.values()))


if __name__ == "__main__": sys.exit(main())
