"""`./task` and the menu, driven as a person drives them.

Most of it runs in a small house with the real `task` and Taskfile.yml and a stand-in for Python, whose `-m venv` and
`-m pip` write down that they were called: so each state (absent, changed, interrupted, failed, two at once) takes
milliseconds. One slow test makes the real environment from nothing.
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
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = [
    "bash",
    "cat",
    "chmod",
    "cksum",
    "date",
    "dirname",
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
]

# Answers `-V` and `-c` as the Python below it; `-m venv` makes a folder with a copy of itself; `-m pip` logs, and puts
# go-task in place at the end of an install as pip does. FAKE_PIP is run in between: `exit 1`, `sleep 1`, ...
FAKE_PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$1 $2" in
    "-m venv") echo venv "$3" >>"{log}"; rm -rf "$4"; mkdir -p "$4/bin"; cat "$0" >"$4/bin/python"; chmod +x "$4/bin/python" ;;
    "-m pip")
        echo "pip $*" >>"{log}"; eval "${{FAKE_PIP:-:}}"
        case "$*" in *'-e .[dev]'*) cat "{mainrun}" >"$here/mainrun"; chmod +x "$here/mainrun"; ln -sf "{task}" "$here/task" ;; esac ;;
    "-V ") echo "Python ${{FAKE_VERSION:-3.11.7}}" ;;
    -c*) exec "{python}" -c 'import sys; sys._base_executable = "{self}"; exec(sys.argv[1])' "$2" ;;
    *) exec "{python}" "$@" ;;
esac
"""

# Says how it was called: arguments, folder.
FAKE_MAINRUN = """#!{python}
import json, os, sys
print(json.dumps([os.getcwd(), *sys.argv[1:]]))
sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
"""


class House:
    """A copy of the bootstrap and the menu in a folder with a space, on a PATH with nothing but what they may use."""

    def __init__(self, tmp: Path) -> None:
        self.root = tmp / "my house"
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
        # a user's name for git, and none of this process' settings
        who = {
            f"GIT_{role}_{what}": "x@example.org"
            for role in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        }
        return {
            "PATH": str(self.bin),
            "HOME": str(self.bin),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "NO_COLOR": "1",
            **who,
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
        """venv and pip calls since the last look: `venv`, `setuptools`, `house`."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [
            "venv" if line.startswith("venv") else "house" if "-e .[dev]" in line else "setuptools"
            for line in lines
        ]


ALL = ["venv", "setuptools", "house"]
UPDATE = ["setuptools", "house"]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
def made(house: House) -> House:
    done = house.task("--version")
    assert done.returncode == 0, done.stderr
    assert house.calls() == ALL
    return house


# -- when it installs


def test_first_call_installs_and_the_second_does_not(made: House) -> None:
    done = made.task("--version")
    assert (done.returncode, done.stderr, made.calls()) == (0, "", [])


def test_every_install_is_held_by_the_constraints(house: House) -> None:
    house.task("--version")
    pip = [line for line in house.log.read_text().splitlines() if line.startswith("pip")]
    assert len(pip) == 2
    assert all(" install " in line and " -c constraints.txt " in line for line in pip)


def _changed(name: str) -> Callable[[House], None]:
    def change(house: House) -> None:
        with (house.root / name).open("a") as f:
            f.write("# changed\n")

    return change


def _new_package(house: House) -> None:
    (house.root / "sweeps").mkdir()
    (house.root / "sweeps/__init__.py").touch()


def _moved(house: House) -> None:
    house.root = house.root.rename(house.root.with_name("moved house"))


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (_changed("constraints.txt"), UPDATE),
        (_changed("pyproject.toml"), UPDATE),
        (_changed("Taskfile.yml"), []),
        (_new_package, UPDATE),
        (_moved, ALL),
        (lambda house: (house.root / ".venv/bin/task").unlink(), UPDATE),
        (lambda house: (house.root / ".venv/bin/python").unlink(), ALL),
        (lambda house: shutil.rmtree(house.root / ".venv"), ALL),
    ],
    ids=["constraints", "pyproject", "menu", "new package", "moved", "no go-task", "no python", "no venv"],
)
def test_what_changed_decides_what_is_made_again(
    made: House, change: Callable[[House], None], calls: list[str]
) -> None:
    change(made)
    done = made.task("--version")
    assert done.returncode == 0, done.stderr
    assert made.calls() == calls
    assert made.task("--version").returncode == 0
    assert made.calls() == []


def test_another_python_makes_another_environment(made: House) -> None:
    assert made.task("--version", FAKE_VERSION="3.12.1").returncode == 0
    assert made.calls() == ALL
    other = made.script(made.bin / "mypython", made.python.read_text().replace("3.11.7", "3.13.0"))
    made.task("--version", PYTHON=str(other))
    assert made.calls() == ALL
    made.task("--version")  # what PYTHON= chose stays chosen
    assert made.calls() == []


def test_a_failed_install_says_what_to_do_and_is_redone(house: House) -> None:
    done = house.task("--version", FAKE_PIP="echo no network here; exit 1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no network here" in done.stderr
    assert "check the network" in done.stderr
    assert str(house.root / ".venv.log") in done.stderr
    assert "no network here" in (house.root / ".venv.log").read_text()
    house.calls()
    assert house.task("--version").returncode == 0
    assert house.calls() == ALL


def test_a_failed_update_leaves_nothing_that_looks_whole(made: House) -> None:
    _changed("constraints.txt")(made)
    assert made.task("--version", FAKE_PIP="exit 1").returncode == 2
    made.calls()
    assert made.task("--version").returncode == 0
    assert made.calls() == ALL


def _until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end, "waited 30 s for nothing"
        time.sleep(0.01)


def test_a_killed_install_is_redone_and_leaves_no_lock(house: House) -> None:
    first = house.start(FAKE_PIP="sleep 60")
    _until(lambda: house.log.exists() and "pip" in house.log.read_text())
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    house.calls()
    done = house.task("--version")
    assert done.returncode == 0, done.stderr
    assert "waiting" not in done.stderr
    assert house.calls() == ALL


def test_two_at_once_install_once(house: House) -> None:
    gate = house.bin / "gate"
    wait = f'while ! [ -e "{gate}" ]; do sleep 0.02; done'
    both = [house.start(FAKE_PIP=wait) for _ in range(2)]
    _until(lambda: house.log.exists() and "pip" in house.log.read_text())
    time.sleep(0.3)  # the other one is at the lock, or will be: it must not go past it
    gate.touch()
    said = [p.communicate(timeout=30)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert house.calls() == ALL


# -- which Python


def _answers(house: House, name: str, lie: str) -> None:
    """A python that is real but for one thing."""
    house.script(
        house.bin / name,
        f"""#!/bin/sh
case $1 in
    -V) echo Python 3.9.18 ;;
    -c) exec "{sys.executable}" -c 'import sys; {lie}; exec(sys.argv[1])' "$2" ;;
esac
""",
    )


OLD = 'sys.version_info = (3, 9, 18, "final", 0)'
BARE = 'sys.modules["ensurepip"] = None'


def test_an_old_python_is_refused(house: House) -> None:
    _answers(house, "python3", OLD)
    done = house.task("--list")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer; found: python3 (Python 3.9.18)" in done.stderr
    assert "PYTHON=" in done.stderr
    assert not (house.root / ".venv").exists()


def test_no_python_is_refused(house: House) -> None:
    house.python.unlink()
    done = house.task("--list")
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs Python 3.11 or newer; found: none" in done.stderr
    assert house.task("--list", PYTHON="/no/such/python").returncode == 2


def test_a_python_without_venv_is_refused(house: House) -> None:
    _answers(house, "python3", BARE)
    done = house.task("--list")
    assert done.returncode == 2
    assert "no venv module" in done.stderr
    assert "python3-venv" in done.stderr


def test_a_newer_python_beside_an_old_one_is_found(house: House) -> None:
    house.python.rename(house.bin / "python3.12")
    house.script(
        house.bin / "python3.12",
        (house.bin / "python3.12").read_text().replace(str(house.python), str(house.bin / "python3.12")),
    )
    _answers(house, "python3", OLD)
    _answers(house, "python3.13", BARE)
    done = house.task("--version")
    assert done.returncode == 0, done.stderr
    assert house.calls() == ALL


def test_an_environment_that_is_a_link_is_refused(house: House, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "notes").touch()
    (house.root / ".venv").symlink_to(theirs)
    done = house.task("--list")
    assert done.returncode == 2
    assert "is a link" in done.stderr and "remove the link" in done.stderr
    assert [path.name for path in theirs.iterdir()] == ["notes"]


def test_an_unwritable_folder_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: that one only its owner may enter
        for file in ("task", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / file, name)
        Path(name).chmod(0o555)
        nobody = 65534 if os.geteuid() == 0 else None  # root may write anywhere
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


# -- from where, and with what


def test_alone_it_lists_the_menu(made: House) -> None:
    done = made.task()
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("* ")] == [
        f"{name}:"
        for name in [
            "train",
            "report",
            "demo",
            "sweep",
            "dashboard",
            "test",
            "mutate",
            "soak",
            "check",
            "checkpoint",
            "submit",
            "verify",
            "download",
            "bench",
            "doctor",
        ]
    ]


@pytest.mark.parametrize("way", ["absolute", "relative", "link", "link to a link", "path"])
def test_from_any_folder_and_through_links(made: House, tmp_path: Path, way: str) -> None:
    away = tmp_path / "else where"
    away.mkdir()
    (away / "link").symlink_to(made.root / "task")
    (away / "relative link").symlink_to("link")
    ways = {
        "absolute": made.root / "task",
        "relative": "../my house/task",
        "link": away / "link",
        "link to a link": "./relative link",
        "path": "task",
    }
    path = f"{made.root}:{made.bin}" if way == "path" else str(made.bin)
    if way == "path":  # found by the shell, not by us
        command = ["sh", "-c", "task train"]
        done = subprocess.run(
            command, cwd=away, env=made.env(PATH=path), capture_output=True, text=True, timeout=60
        )
    else:
        done = made.task("train", cwd=away, via=ways[way])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(away), "train"]  # relative --out and corpus paths are the caller's
    assert made.calls() == []


@pytest.mark.parametrize(
    ("args", "arrives"),
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
def test_arguments_arrive_whole(made: House, args: list[str], arrives: list[str]) -> None:
    done = made.task(*args)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[1:] == arrives


@pytest.mark.parametrize("code", [1, 2, 3, 75])
def test_exit_codes_arrive(made: House, code: int) -> None:
    assert made.task("train", FAKE_EXIT=str(code)).returncode == code


def test_a_go_task_of_ones_own_is_told_the_way(house: House) -> None:
    own = house.bin / "task"
    own.symlink_to(shutil.which("task", path=str(Path(sys.executable).parent)) or str(shutil.which("task")))
    done = house.task("train", via=own)
    assert done.returncode != 0
    assert "start it as ./task" in done.stderr
    assert house.calls() == []


def test_the_second_call_adds_less_than_300_ms(made: House) -> None:
    def best(command: list[str]) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run(command, env=made.env(), check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        return min(times)

    added = best([str(made.root / "task"), "--version"]) - best(
        [str(made.root / ".venv/bin/task"), "--version"]
    )
    assert added < 0.3


# -- task checkpoint


def git(house: House, *args: str) -> str:
    done = subprocess.run(
        ["git", *args],
        cwd=house.root,
        env=house.env(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def repo(made: House) -> House:
    shutil.copy(ROOT / ".gitignore", made.root / ".gitignore")
    git(made, "init", "--quiet")
    return made


def test_checkpoint_commits_the_whole_tree(repo: House) -> None:
    done = repo.task("checkpoint", "--", "lr 0.01, it's better $(date)", cwd=repo.root / "mainrun")
    assert done.returncode == 0, done.stderr
    assert git(repo, "log", "--format=%s") == "lr 0.01, it's better $(date)"
    assert git(repo, "status", "--porcelain") == ""
    assert ".venv" not in git(repo, "ls-files")
    (repo.root / "constraints.txt").unlink()
    (repo.root / "new.txt").touch()
    # made again first: constraints.txt is gone, so this goes by go-task alone
    assert (
        subprocess.run(
            [repo.root / ".venv/bin/task", "checkpoint"], cwd=repo.root, env=repo.env(), check=False
        ).returncode
        == 0
    )
    assert git(repo, "show", "--format=%s", "--name-status").splitlines()[2:] == [
        "D\tconstraints.txt",
        "A\tnew.txt",
    ]
    assert git(repo, "log", "-1", "--format=%s").startswith("checkpoint 20")


def test_checkpoint_refuses_when_nothing_changed(repo: House) -> None:
    assert repo.task("checkpoint").returncode == 0
    done = repo.task("checkpoint")
    assert done.returncode == 2
    assert "nothing to commit" in done.stderr
    assert git(repo, "rev-list", "--count", "HEAD") == "1"


def test_checkpoint_refuses_outside_git(made: House) -> None:
    done = made.task("checkpoint")
    assert done.returncode == 2
    assert "is not in a git repository" in done.stderr


def test_checkpoint_refuses_another_projects_repository(made: House) -> None:
    subprocess.run(["git", "init", "--quiet", str(made.root.parent)], env=made.env(), check=True)
    done = made.task("checkpoint")
    assert done.returncode == 2
    assert "larger git repository" in done.stderr


def test_checkpoint_that_git_refuses_fails(repo: House) -> None:
    assert repo.task("checkpoint").returncode == 0
    (repo.root / "new.txt").touch()
    repo.script(repo.root / ".git/hooks/pre-commit", "#!/bin/sh\nexit 1\n")
    done = repo.task("checkpoint")
    assert done.returncode == 1
    assert done.stdout == ""


def test_submit_commits_first_and_only_what_is_new(repo: House) -> None:
    for commits in ("1", "1", "2"):
        done = repo.task("submit", "--", "--run", "a b", cwd=repo.root / "mainrun")
        assert json.loads(done.stdout.splitlines()[-1]) == [
            str(repo.root / "mainrun"),
            "submit",
            "--run",
            "a b",
        ], done.stderr
        assert (
            git(repo, "rev-list", "--count", "HEAD") == commits and git(repo, "status", "--porcelain") == ""
        )
        assert git(repo, "log", "-1", "--format=%s").startswith(
            "checkpoint 20"
        )  # the arguments are the command's, no message
        if done.stdout.count("\n") == 1:
            (repo.root / "new.txt").touch()


# -- what CI runs


@pytest.mark.parametrize(("fast", "slow", "code"), [(True, True, 0), (False, True, 1), (True, False, 1)])
def test_ci_ends_with_pytests_summary_and_its_verdict(made: House, fast: bool, slow: bool, code: int) -> None:
    shutil.copytree(ROOT / ".ci", made.root / ".ci")
    (made.root / "tests").mkdir()
    (made.root / "tests/test_x.py").write_text(
        f"import pytest\ndef test_a():\n    assert {fast}\n@pytest.mark.slow\ndef test_b():\n    assert {slow}\n"
    )
    env = made.env(CI="true")
    del env["NO_COLOR"]  # as CI calls it: go-task then writes in colours
    done = subprocess.run(
        [made.root / ".ci/run"], cwd="/", env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout
    assert done.stderr == ""
    ends = [
        line for line in done.stdout.splitlines() if re.fullmatch(r"=+ 1 (passed|failed) in [\d.]+s =+", line)
    ]
    assert [
        ("1 passed" if ok else "1 failed") in line for ok, line in zip((fast, slow), ends, strict=True)
    ] == [True, True]
    assert done.stdout.splitlines()[-1] == ends[-1]


# -- the real thing


@pytest.mark.slow
def test_a_fresh_clone_needs_one_command(tmp_path: Path) -> None:
    """What is in git, or about to be, and Python: nothing else. Needs the package index that pip is set to."""
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
    env["NO_COLOR"] = "1"  # go-task colours its menu whenever CI is set
    env["PATH"] = os.pathsep.join(
        p for p in os.environ["PATH"].split(os.pathsep) if p != str(Path(sys.executable).parent)
    )

    def task(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [clone / "task", *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=850
        )

    menu = task()
    assert menu.returncode == 0, menu.stderr
    assert "train:" in menu.stdout
    again = task()
    assert (again.stdout, again.stderr) == (menu.stdout, "")
    asked = subprocess.run(
        [clone / ".venv/bin/mainrun", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert asked.returncode == 0, asked.stderr
    found = subprocess.run(
        [clone / ".venv/bin/python", "-c", "import mainrun, torch; print(mainrun.__file__); print(torch.__version__)"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert found[0] == str(clone / "mainrun/__init__.py")
    assert found[1].split("+")[0] == "2.13.0"
