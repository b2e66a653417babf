"""Tests `./task` and the tasks of Taskfile.yml.

Most tests use the real files with a fake Python, in which `-m venv` and `-m pip` only log their calls. These
tests check within milliseconds what happens if the environment is absent, changed, interrupted, failed, or
installed by two processes at once. One slow test creates the real environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import slow_unless

ROOT = Path(__file__).parents[2]
TOOLS = [
    "bash",
    "cat",
    "chmod",
    "cksum",
    "date",
    "dirname",
    "du",
    "env",
    "git",
    "ln",
    "mkdir",
    "mv",
    "readlink",
    "rm",
    "sed",
    "sh",
    "sleep",
    "tail",
    "uname",
]

# `-V` and `-c` work as in the real Python. `-m venv` creates a folder with a copy of this script. `-m pip`
# logs the call, runs FAKE_PIP (for example `exit 1` or `sleep 1`), and finally installs go-task.
FAKE_PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$1 $2" in
    "-m venv")
        echo venv "$3" >>"{log}"; rm -rf "$4"; mkdir -p "$4/bin"
        cat "$0" >"$4/bin/python"; chmod +x "$4/bin/python" ;;
    "-m pip")
        echo "pip $*" >>"{log}"; eval "${{FAKE_PIP:-:}}"
        case "$*" in *'-e .[dev]'*)
            cat "{mainrun}" >"$here/mainrun"; chmod +x "$here/mainrun"; ln -sf "{task}" "$here/task" ;;
        esac ;;
    "-V ") echo "Python ${{FAKE_VERSION:-3.11.7}}" ;;
    -c*)
        shift
        exec "{python}" -c 'import sys; sys._base_executable = "{self}"; exec(sys.argv.pop(1))' "$@" ;;
    *) exec "{python}" "$@" ;;
esac
"""

# This script prints the current folder and its arguments.
FAKE_MAINRUN = """#!{python}
import json, os, sys
print(json.dumps([os.getcwd(), *sys.argv[1:]]))
sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
"""


class Clone:
    """A copy of `task` and Taskfile.yml in a folder with a space in its name.

    PATH has only the needed tools.
    """

    def __init__(self, tmp: Path) -> None:
        self.root = tmp / "my clone"
        self.bin = tmp / "bin"
        self.log = tmp / "calls.log"
        self.python = self.bin / "python3"
        (self.root / "mainrun").mkdir(parents=True)
        (self.root / "mainrun/__init__.py").touch()
        for name in ("task", "Taskfile.yml", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.bin.mkdir()
        for tool in TOOLS:
            os.symlink(shutil.which(tool) or tool, self.bin / tool)
        mainrun = self.script(tmp / "mainrun", FAKE_MAINRUN.format(python=sys.executable))
        go_task = shutil.which("task", path=str(Path(sys.executable).parent)) or shutil.which("task")
        self.script(
            self.python,
            FAKE_PYTHON.format(
                log=self.log, mainrun=mainrun, task=go_task, python=sys.executable, self=self.python
            ),
        )

    @staticmethod
    def script(path: Path, text: str) -> Path:
        path.write_text(text)
        path.chmod(0o755)
        return path

    def env(self, **extra: str) -> dict[str, str]:
        """Return an environment with a git user and without the variables of this process."""
        return {
            "PATH": str(self.bin),
            "HOME": str(self.bin),
            "NO_COLOR": "1",
            "MAINRUN_TORCH": "default",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_AUTHOR_NAME": "x@example.org",
            "GIT_AUTHOR_EMAIL": "x@example.org",
            "GIT_COMMITTER_NAME": "x@example.org",
            "GIT_COMMITTER_EMAIL": "x@example.org",
            **extra,
        }

    def task(
        self, *args: str, cwd: Path | None = None, via: Path | str | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        command = [str(via or self.root / "task"), *args]
        return subprocess.run(
            command, cwd=cwd or self.root, env=self.env(**env), capture_output=True, text=True, timeout=60
        )

    def start(self, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.root / "task"), "--version"],
            env=self.env(**env),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def calls(self) -> list[str]:
        """Return which of venv, setuptools and mainrun were installed since the last call of this method."""
        calls = []
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        for line in lines:
            if line.startswith("venv"):
                calls.append("venv")
            elif "-e .[dev]" in line:
                calls.append("mainrun")
            else:
                calls.append("setuptools")
        self.log.unlink(missing_ok=True)
        return calls


ALL = ["venv", "setuptools", "mainrun"]
UPDATE = ["setuptools", "mainrun"]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture
def installed(clone: Clone) -> Clone:
    done = clone.task("--version")
    assert done.returncode == 0, done.stderr
    assert clone.calls() == ALL
    return clone


# -- when it installs


def test_only_the_first_call_installs(installed: Clone) -> None:
    done = installed.task("--version")
    assert (done.returncode, done.stderr, installed.calls()) == (0, "", [])


def test_every_installation_uses_the_constraints(clone: Clone) -> None:
    clone.task("--version")
    pip = [line for line in clone.log.read_text().splitlines() if line.startswith("pip")]
    assert len(pip) == 2
    assert all(" install " in line and " -c constraints.txt " in line for line in pip)


def _changed(name: str) -> Callable[[Clone], None]:
    def change(clone: Clone) -> None:
        with (clone.root / name).open("a") as f:
            f.write("# changed\n")

    return change


def _new_package(clone: Clone) -> None:
    (clone.root / "sweeps").mkdir()
    (clone.root / "sweeps/__init__.py").touch()


def _moved(clone: Clone) -> None:
    clone.root = clone.root.rename(clone.root.with_name("moved clone"))


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (_changed("constraints.txt"), UPDATE),
        (_changed("pyproject.toml"), UPDATE),
        (_changed("Taskfile.yml"), []),
        (_new_package, UPDATE),
        (_moved, ALL),
        (lambda clone: (clone.root / ".venv/bin/task").unlink(), UPDATE),
        (lambda clone: (clone.root / ".venv/bin/python").unlink(), ALL),
        (lambda clone: shutil.rmtree(clone.root / ".venv"), ALL),
    ],
    ids=["constraints", "pyproject", "menu", "new package", "moved", "no go-task", "no python", "no venv"],
)
def test_a_change_updates_or_recreates_the_environment(
    installed: Clone, change: Callable[[Clone], None], calls: list[str]
) -> None:
    change(installed)
    done = installed.task("--version")
    assert done.returncode == 0, done.stderr
    assert installed.calls() == calls
    assert installed.task("--version").returncode == 0
    assert installed.calls() == []


def test_another_python_recreates_the_environment(installed: Clone) -> None:
    assert installed.task("--version", FAKE_VERSION="3.12.1").returncode == 0
    assert installed.calls() == ALL
    other = installed.script(
        installed.bin / "mypython", installed.python.read_text().replace("3.11.7", "3.13.0")
    )
    installed.task("--version", PYTHON=str(other))
    assert installed.calls() == ALL
    installed.task("--version")  # the environment keeps the interpreter that PYTHON selected
    assert installed.calls() == []


def test_a_failed_installation_is_explained_and_repeated(clone: Clone) -> None:
    done = clone.task("--version", FAKE_PIP="echo no network here; exit 1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no network here" in done.stderr
    assert "check the network" in done.stderr
    assert str(clone.root / ".venv.log") in done.stderr
    assert "no network here" in (clone.root / ".venv.log").read_text()
    clone.calls()
    assert clone.task("--version").returncode == 0
    assert clone.calls() == ALL


def test_after_a_failed_update_everything_is_installed_again(installed: Clone) -> None:
    _changed("constraints.txt")(installed)
    assert installed.task("--version", FAKE_PIP="exit 1").returncode == 2
    installed.calls()
    assert installed.task("--version").returncode == 0
    assert installed.calls() == ALL


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited 30 s in vain"
        time.sleep(0.01)


def test_a_killed_installation_is_repeated_and_leaves_no_lock(clone: Clone) -> None:
    first = clone.start(FAKE_PIP="sleep 60")
    wait_until(lambda: clone.log.exists() and "pip" in clone.log.read_text())
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    clone.calls()
    done = clone.task("--version")
    assert done.returncode == 0, done.stderr
    assert "waiting" not in done.stderr
    assert clone.calls() == ALL


def test_two_processes_install_once(clone: Clone) -> None:
    gate = clone.bin / "gate"
    wait = f'while ! [ -e "{gate}" ]; do sleep 0.02; done'
    both = [clone.start(FAKE_PIP=wait) for _ in range(2)]
    wait_until(lambda: clone.log.exists() and "pip" in clone.log.read_text())
    time.sleep(0.3)  # give the other process time to reach the lock, where it must wait
    gate.touch()
    messages = [process.communicate(timeout=30)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], messages
    assert clone.calls() == ALL


# -- which PyTorch


class Index:
    """A package index on loopback that answers, fails, or is silent."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.status = 200
        self.silence = threading.Event()
        self.silence.set()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append(self.path)
                index.silence.wait(60)
                self.send_response(index.status)
                self.end_headers()
                self.wfile.write(b"<a href='torch-2.13.0+cpu-py3-none-any.whl'>torch</a>")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/whl"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.silence.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def index() -> Iterator[Index]:
    index = Index()
    yield index
    index.close()


def torch_calls(clone: Clone) -> list[str]:
    """Return the calls that installed torch alone, without the options that all calls share."""
    calls = []
    for line in clone.log.read_text().splitlines():
        if line.endswith(" torch"):
            calls.append(line.partition("-c constraints.txt ")[2])
    clone.log.unlink()
    return calls


@pytest.mark.parametrize(("build", "folder"), [("cpu", "cpu"), ("cuda", "cu130")])
def test_the_chosen_build_is_installed_from_the_index_of_pytorch(
    clone: Clone, index: Index, build: str, folder: str
) -> None:
    env = {"MAINRUN_TORCH": build, "MAINRUN_TORCH_INDEX": index.url}
    done = clone.task("--version", **env)
    assert done.returncode == 0, done.stderr
    assert index.asked == [f"/whl/{folder}/torch/"]
    assert torch_calls(clone) == [f"--no-deps --index-url {index.url}/{folder} torch"]
    assert f"from {index.url}/{folder}" in done.stderr
    assert re.search(r"\.venv has PyTorch \S+ and \S+ of files", done.stderr)
    # The environment keeps the build, also if it is updated without MAINRUN_TORCH.
    assert clone.task("--version", **env).stderr == ""
    assert clone.task("--version", MAINRUN_TORCH="").stderr == ""
    _changed("pyproject.toml")(clone)
    clone.task("--version", MAINRUN_TORCH="", MAINRUN_TORCH_INDEX=index.url)
    assert torch_calls(clone) == [f"--no-deps --index-url {index.url}/{folder} torch"]


def test_another_build_recreates_the_environment(installed: Clone, index: Index) -> None:
    env = {"MAINRUN_TORCH": "cpu", "MAINRUN_TORCH_INDEX": index.url}
    assert "creating" in installed.task("--version", **env).stderr
    assert "creating" in installed.task("--version", MAINRUN_TORCH="default").stderr
    assert "creating" not in installed.task("--version", MAINRUN_TORCH="").stderr


def test_an_environment_without_a_note_about_its_build_keeps_it(installed: Clone, index: Index) -> None:
    """Versions that did not choose a build left no note."""
    (installed.root / ".venv/torch").unlink()
    _changed("constraints.txt")(installed)
    done = installed.task("--version", MAINRUN_TORCH="", MAINRUN_TORCH_INDEX=index.url)
    assert done.returncode == 0
    assert (installed.calls(), index.asked) == (UPDATE, [])


@pytest.mark.parametrize(
    "fault", slow_unless(["refused", "no build"], ["refused", "missing", "silent", "no build"])
)
def test_without_the_index_of_pytorch_the_default_index_is_used(
    clone: Clone, index: Index, fault: str
) -> None:
    env = {"MAINRUN_TORCH": "cpu", "MAINRUN_TORCH_INDEX": index.url}
    if fault == "refused":
        env["MAINRUN_TORCH_INDEX"] = "http://127.0.0.1:9/whl"
    elif fault == "missing":
        index.status = 404
    elif fault == "silent":
        index.silence.clear()
    else:
        env["FAKE_PIP"] = 'case "$*" in *" torch") exit 1 ;; esac'
    begin = time.monotonic()
    done = clone.task("--version", **env)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 20
    assert "installing PyTorch from the default index" in done.stderr
    assert len(torch_calls(clone)) == (fault == "no build")
    assert clone.task("--version", **env).stderr == "", "the choice is not tried again at every call"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has two builds")
@pytest.mark.parametrize("gpu", [False, True])
def test_the_gpu_decides(clone: Clone, index: Index, gpu: bool) -> None:
    if Path("/dev/nvidiactl").exists() and not gpu:
        pytest.skip("this machine has a GPU")
    clone.script(clone.bin / "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    done = clone.task("--version", MAINRUN_TORCH="", MAINRUN_TORCH_INDEX=index.url)
    assert done.returncode == 0, done.stderr
    assert ("found no NVIDIA GPU" in done.stderr) == (not gpu)
    assert index.asked == ([] if gpu else ["/whl/cpu/torch/"])


def test_an_unknown_build_is_refused(installed: Clone) -> None:
    done = installed.task("--version", MAINRUN_TORCH="rocm")
    assert (done.returncode, done.stdout) == (2, "")
    assert "got MAINRUN_TORCH=rocm; write cpu, cuda or default" in done.stderr


@pytest.mark.parametrize(
    "variable",
    slow_unless(["", "PIP_INDEX_URL"], ["", "PIP_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"]),
)
def test_uv_is_used_unless_pip_has_an_index(clone: Clone, index: Index, variable: str) -> None:
    uv = f'''#!/bin/sh
echo "uv $*" >>"{clone.log}"
[ "$1" = --version ] || shift 4
exec "{clone.root}/.venv/bin/python" -m pip install "$@" >/dev/null'''
    clone.script(clone.bin / "uv", uv)
    env = {"MAINRUN_TORCH": "cpu", "MAINRUN_TORCH_INDEX": index.url} | ({variable: "x"} if variable else {})
    done = clone.task("--version", **env)
    assert done.returncode == 0, done.stderr
    calls = [line for line in clone.log.read_text().splitlines() if line.startswith("uv pip")]
    options = f"uv pip install --python {clone.root}/.venv/bin/python -c constraints.txt"
    expected = [
        f"{options} --upgrade setuptools",
        f"{options} --no-deps --index-url {index.url}/cpu torch",
        f"{options} --no-build-isolation -e .[dev]",
    ]
    assert calls == ([] if variable else expected)


# -- which Python


def _install_python(clone: Clone, name: str, patch: str) -> None:
    """Install a fake Python that runs `patch` before any other code."""
    clone.script(
        clone.bin / name,
        f"""#!/bin/sh
case $1 in
    -V) echo Python 3.9.18 ;;
    -c) exec "{sys.executable}" -c 'import sys; {patch}; exec(sys.argv[1])' "$2" ;;
esac
""",
    )


OLD = 'sys.version_info = (3, 9, 18, "final", 0)'
BARE = 'sys.modules["ensurepip"] = None'


def test_an_old_python_is_refused(clone: Clone) -> None:
    _install_python(clone, "python3", OLD)
    done = clone.task("--list")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer; found: python3 (Python 3.9.18)" in done.stderr
    assert "PYTHON=" in done.stderr
    assert not (clone.root / ".venv").exists()


def test_no_python_is_refused(clone: Clone) -> None:
    clone.python.unlink()
    done = clone.task("--list")
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs Python 3.11 or newer; found: none" in done.stderr
    assert clone.task("--list", PYTHON="/no/such/python").returncode == 2


def test_a_python_without_venv_is_refused(clone: Clone) -> None:
    _install_python(clone, "python3", BARE)
    done = clone.task("--list")
    assert done.returncode == 2
    assert "no venv module" in done.stderr
    assert "python3-venv" in done.stderr


def test_a_newer_python_next_to_an_old_one_is_used(clone: Clone) -> None:
    clone.python.rename(clone.bin / "python3.12")
    clone.script(
        clone.bin / "python3.12",
        (clone.bin / "python3.12").read_text().replace(str(clone.python), str(clone.bin / "python3.12")),
    )
    _install_python(clone, "python3", OLD)
    _install_python(clone, "python3.13", BARE)
    done = clone.task("--version")
    assert done.returncode == 0, done.stderr
    assert clone.calls() == ALL


def test_an_environment_that_is_a_link_is_refused(clone: Clone, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes").touch()
    (clone.root / ".venv").symlink_to(target)
    done = clone.task("--list")
    assert done.returncode == 2
    assert "is a link" in done.stderr and "remove the link" in done.stderr
    assert [path.name for path in target.iterdir()] == ["notes"]


def test_an_unwritable_folder_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:  # other users cannot enter tmp_path
        for file in ("task", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / file, name)
        Path(name).chmod(0o555)
        nobody = 65534 if os.geteuid() == 0 else None  # root may write to any folder
        done = subprocess.run(
            [f"{name}/task"],
            cwd="/",
            user=nobody,
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        Path(name).chmod(0o755)
    assert done.returncode == 2
    assert "cannot write to" in done.stderr


# -- calls from other folders


def test_without_arguments_it_lists_the_tasks(installed: Clone) -> None:
    done = installed.task()
    assert done.returncode == 0
    listed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("* ")]
    assert listed == [
        "train:",
        "report:",
        "demo:",
        "sweep:",
        "dashboard:",
        "test:",
        "mutate:",
        "soak:",
        "check:",
        "docs:",
        "checkpoint:",
        "submit:",
        "verify:",
        "download:",
        "bench:",
        "doctor:",
    ]


@pytest.mark.parametrize(
    "way",
    slow_unless(["relative", "link to a link"], ["absolute", "relative", "link", "link to a link", "path"]),
)
def test_calls_from_any_folder_and_through_links(installed: Clone, tmp_path: Path, way: str) -> None:
    away = tmp_path / "else where"
    away.mkdir()
    (away / "link").symlink_to(installed.root / "task")
    (away / "relative link").symlink_to("link")
    ways = {
        "absolute": installed.root / "task",
        "relative": "../my clone/task",
        "link": away / "link",
        "link to a link": "./relative link",
        "path": "task",
    }
    path = f"{installed.root}:{installed.bin}" if way == "path" else str(installed.bin)
    if way == "path":  # the shell finds `task` on PATH
        command = ["sh", "-c", "task train"]
        done = subprocess.run(
            command, cwd=away, env=installed.env(PATH=path), capture_output=True, text=True, timeout=60
        )
    else:
        done = installed.task("train", cwd=away, via=ways[way])
    assert done.returncode == 0, done.stderr
    # The command runs in the folder from which it was called.
    assert json.loads(done.stdout) == [str(away), "train"]
    assert installed.calls() == []


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["train", "--", "--preset", "baseline"], ["train", "--preset", "baseline"]),
        (
            ["train", "--", "--set", "corpus=file:my file's.txt", "$HOME", "*", ""],
            ["train", "--set", "corpus=file:my file's.txt", "$HOME", "*", ""],
        ),
        (["demo"], ["demo"]),
        (["demo", "--", "--out", "my demo"], ["demo", "--out", "my demo"]),
        (["download"], ["download", "hn"]),
        (["download", "--", "hn-2025"], ["download", "hn-2025"]),
        (["doctor", "--", "--json"], ["doctor", "--json"]),
    ],
)
def test_arguments_are_passed_unchanged(installed: Clone, args: list[str], expected: list[str]) -> None:
    done = installed.task(*args)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[1:] == expected


@pytest.mark.parametrize("code", [1, 2, 3, 75])
def test_exit_codes_are_passed_on(installed: Clone, code: int) -> None:
    assert installed.task("train", FAKE_EXIT=str(code)).returncode == code


def test_a_separate_go_task_is_refused(clone: Clone) -> None:
    go_task = clone.bin / "task"
    go_task.symlink_to(
        shutil.which("task", path=str(Path(sys.executable).parent)) or str(shutil.which("task"))
    )
    done = clone.task("train", via=go_task)
    assert done.returncode != 0
    assert "run ./task in" in done.stderr
    assert clone.calls() == []


def test_the_second_call_adds_less_than_300_ms(installed: Clone) -> None:
    def best_time(command: list[str]) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run(command, env=installed.env(), check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        return min(times)

    with_script = best_time([str(installed.root / "task"), "--version"])
    without_script = best_time([str(installed.root / ".venv/bin/task"), "--version"])
    assert with_script - without_script < 0.3


# -- task checkpoint


def git(clone: Clone, *args: str) -> str:
    done = subprocess.run(
        ["git", *args],
        cwd=clone.root,
        env=clone.env(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def repo(installed: Clone) -> Clone:
    shutil.copy(ROOT / ".gitignore", installed.root / ".gitignore")
    git(installed, "init", "--quiet")
    return installed


def test_checkpoint_commits_the_whole_tree(repo: Clone) -> None:
    done = repo.task("checkpoint", "--", "lr 0.01, it's better $(date)", cwd=repo.root / "mainrun")
    assert done.returncode == 0, done.stderr
    assert git(repo, "log", "--format=%s") == "lr 0.01, it's better $(date)"
    assert git(repo, "status", "--porcelain") == ""
    assert ".venv" not in git(repo, "ls-files")
    (repo.root / "constraints.txt").unlink()
    (repo.root / "new.txt").touch()
    # call go-task directly, because ./task needs constraints.txt
    go_task = [repo.root / ".venv/bin/task", "checkpoint"]
    assert subprocess.run(go_task, cwd=repo.root, env=repo.env(), check=False).returncode == 0
    changes = git(repo, "show", "--format=%s", "--name-status").splitlines()[2:]
    assert changes == ["D\tconstraints.txt", "A\tnew.txt"]
    assert git(repo, "log", "-1", "--format=%s").startswith("checkpoint 20")


def test_checkpoint_refuses_an_unchanged_tree(repo: Clone) -> None:
    assert repo.task("checkpoint").returncode == 0
    done = repo.task("checkpoint")
    assert done.returncode == 2
    assert "nothing to commit" in done.stderr
    assert git(repo, "rev-list", "--count", "HEAD") == "1"


def test_checkpoint_refuses_outside_git(installed: Clone) -> None:
    done = installed.task("checkpoint")
    assert done.returncode == 2
    assert "is not in a git repository" in done.stderr


def test_checkpoint_refuses_a_folder_of_a_larger_repository(installed: Clone) -> None:
    subprocess.run(["git", "init", "--quiet", str(installed.root.parent)], env=installed.env(), check=True)
    done = installed.task("checkpoint")
    assert done.returncode == 2
    assert "larger git repository" in done.stderr


def test_checkpoint_fails_if_git_refuses_the_commit(repo: Clone) -> None:
    assert repo.task("checkpoint").returncode == 0
    (repo.root / "new.txt").touch()
    repo.script(repo.root / ".git/hooks/pre-commit", "#!/bin/sh\nexit 1\n")
    done = repo.task("checkpoint")
    assert done.returncode == 1
    assert done.stdout == ""


def test_submit_first_commits_changes(repo: Clone) -> None:
    for commits in ("1", "1", "2"):
        done = repo.task("submit", "--", "--run", "a b", cwd=repo.root / "mainrun")
        call = json.loads(done.stdout.splitlines()[-1])
        assert call == [str(repo.root / "mainrun"), "submit", "--run", "a b"], done.stderr
        assert git(repo, "rev-list", "--count", "HEAD") == commits
        assert git(repo, "status", "--porcelain") == ""
        # The arguments of the command must not become the commit message.
        assert git(repo, "log", "-1", "--format=%s").startswith("checkpoint 20")
        if done.stdout.count("\n") == 1:
            (repo.root / "new.txt").touch()


# -- what CI runs


@pytest.mark.parametrize(
    ("fast", "slow", "code"),
    [(True, True, 0), pytest.param(False, True, 1, marks=pytest.mark.slow), (True, False, 1)],
)
def test_ci_fails_with_the_tests_and_ends_with_the_summary_of_pytest(
    installed: Clone, fast: bool, slow: bool, code: int
) -> None:
    shutil.copytree(ROOT / ".ci", installed.root / ".ci")
    (installed.root / "tests").mkdir()
    (installed.root / "tests/test_x.py").write_text(
        "import pytest\n"
        f"def test_a():\n    assert {fast}\n"
        f"@pytest.mark.slow\ndef test_b():\n    assert {slow}\n"
    )
    env = installed.env(CI="true")
    del env["NO_COLOR"]  # as in CI, let go-task print in colours
    done = subprocess.run(
        [installed.root / ".ci/run"], cwd="/", env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    summaries = [
        line for line in lines if re.fullmatch(r"=+ 1 (passed|failed) in [\d.]+s( \(.*\))? =+", line)
    ]
    results = ["1 passed" in line for line in summaries]
    assert results == [fast, slow]
    assert lines[-1] == summaries[-1]


# -- the real environment


@pytest.mark.slow
def test_a_fresh_clone_needs_one_command(tmp_path: Path) -> None:
    """The clone has only the files of the repository and a Python. pip needs access to a package index."""
    clone = tmp_path / "fresh clone"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHON")}
    env["NO_COLOR"] = "1"  # go-task colours its list of tasks if CI is set
    env["PATH"] = os.pathsep.join(
        p for p in os.environ["PATH"].split(os.pathsep) if p != str(Path(sys.executable).parent)
    )

    def task(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [clone / "task", *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=850
        )

    first = task()
    assert first.returncode == 0, first.stderr
    assert "train:" in first.stdout
    second = task()
    assert (second.stdout, second.stderr) == (first.stdout, "")
    mainrun = [clone / ".venv/bin/mainrun", "--help"]
    usage = subprocess.run(mainrun, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert usage.returncode == 0, usage.stderr
    code = "import mainrun, torch; print(mainrun.__file__); print(torch.__version__)"
    python = [clone / ".venv/bin/python", "-c", code]
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    package, version = done.stdout.splitlines()
    assert package == str(clone / "mainrun/__init__.py")
    assert version.split("+")[0] == "2.13.0"
